"""The axes along which vectors are coded: a random rotation for all, or calibrated ones a head, from a file.

A KLT basis (the eigenvectors of the second moment) turns a head's correlations into unequal variances, and reverse
water-filling gives each band of coordinates its bits (Cover and Thomas, Elements of Information Theory, 10.3.3).
Calibration needs about 16 d vectors a head; with fewer than 2 d, or on another head, it is worse than none: every entry
carries the verdict of a held-out check, and a head that did not win keeps the random rotation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TqaiError
from ..files import check_tensor, checked, once_per_version, read_with_header, write_tensors
from ..modelhash import check_model
from . import rotation
from .scalar import run_bytes

FIELD, FORMAT = "tqai-bases", 1  # of the file's header
MOST = 4096  # numbers that one matrix rotates
BAND = 8  # coordinates that share a width
# NMSE of a unit-variance coordinate by width: what a bit buys. Measured with the trellis (benchmarks/trellis_levels.py)
NMSE = (1.0, 0.316, 0.0884, 0.0242, 0.00656, 0.0018, 0.000454, 0.000114, 0.000029)
Run = tuple[int, int, int]  # first coordinate, last + 1, bits


@dataclass(frozen=True)
class Basis:
    """One head's axes: rows of ``matrix [d, d]`` (or of a block of it), ``scale [d]`` their standard deviations or
    None for alike ones, ``runs`` the bits of each stretch of coordinates. ``levels_for`` is the dimension whose
    coordinate distribution the levels are made for, None for a Gaussian. ``signs [d]`` where ``matrix`` is Sylvester's
    Hadamard matrix times them, over sqrt(d)."""

    matrix: Tensor
    runs: tuple[Run, ...]
    scale: Tensor | None = None
    block: int | None = None
    levels_for: int | None = None
    signs: Tensor | None = None

    @cached_property
    def small(self) -> Tensor:
        """The inner factor of a Hadamard matrix for :func:`rotation.hadamard`."""
        assert self.signs is not None
        return (self.matrix[: rotation.SMALL, : rotation.SMALL] * self.signs[: rotation.SMALL]).contiguous()

    @cached_property
    def signed(self) -> Tensor:
        """``small`` with the signs of each block, for :func:`rotation.hadamard_columns`."""
        assert self.signs is not None
        return self.small * self.signs.view(-1, 1, rotation.SMALL)

    @cached_property
    def columns(self) -> Tensor:
        """``matrix.T``, contiguous: the product with rows of vectors is then faster."""
        return self.matrix.T.contiguous()

    def butterfly(self, x: Tensor) -> bool:
        """Whether ``x [n, d]`` is rotated faster by :func:`rotation.hadamard`: on a CPU, enough vectors to hide its calls."""
        return self.signs is not None and x.device.type == "cpu" and len(x) >= 256

    @property
    def whole(self) -> bool:
        return len(self.runs) == 1

    @property
    def active(self) -> Tensor:
        """Coordinates that get any bits."""
        return torch.cat([torch.arange(a, b, device=self.matrix.device) for a, b, bits in self.runs if bits])

    @property
    def row_bytes(self) -> int:
        return sum(run_bytes(b - a, bits) for a, b, bits in self.runs if bits)

    def forward(self, q: Tensor) -> Tensor:
        """``q [n, d]`` on these axes, unscaled: what a decoded vector in this domain is multiplied with."""
        return q @ self.columns if self.block is None else (q.reshape(-1, self.block) @ self.columns).view(q.shape)

    def to(self, device: torch.device) -> Basis:
        scale = None if self.scale is None else self.scale.to(device)
        signs = None if self.signs is None else self.signs.to(device)
        return Basis(self.matrix.to(device), self.runs, scale, self.block, self.levels_for, signs)


@dataclass(frozen=True)
class Bases:
    """The bases of one stream: one for all heads, or one a head."""

    heads: tuple[Basis, ...]
    _moved: dict[str, tuple[Basis, ...]] = field(default_factory=dict, compare=False, repr=False)

    def at(self, device: torch.device) -> tuple[Basis, ...]:
        if (key := str(device)) not in self._moved:
            self._moved[key] = tuple(basis.to(device) for basis in self.heads)
        return self._moved[key]


_HADAMARD: dict[tuple[int, int, int], Bases] = {}  # a plain dict: torch.compile reads it, but not a cache


def hadamard(d: int, bits: int, seed: int) -> Bases:
    """The random rotation for vectors of ``d``, made once."""
    if (key := (d, bits, seed)) not in _HADAMARD:
        block = rotation.block_size(d)
        if block > MOST:
            raise TqaiError(f"vectors of {d} numbers cannot be rotated: beyond {MOST}, give a size that 16 divides")
        matrix = rotation.matrix(block, seed)
        fast = block == d and d & (d - 1) == 0 and d >= 4 * rotation.SMALL
        signs = matrix[0].sign() if fast else None  # the first row of Sylvester's matrix is all ones
        _HADAMARD[key] = Bases((Basis(matrix, ((0, d, bits),), None, None if block == d else block, d, signs),))
    return _HADAMARD[key]


def klt(samples: Tensor, bits: int, centred: bool = True) -> Basis:
    """The KLT basis of ``samples [n, d]`` with runs of bits that average ``bits`` exactly.

    ``centred``: about their mean, for a codec that takes the mean off; otherwise about zero.
    """
    x = samples.float()
    if centred:
        x = x - x.mean(0)
    return klt_of(x.T @ x / max(len(x), 1), bits)


def klt_of(moment: Tensor, bits: int) -> Basis:
    """The KLT basis of vectors whose second moment is ``moment [d, d]``."""
    variance, vectors = torch.linalg.eigh(moment.double())
    variance, vectors = variance.flip(0).clamp_min(0), vectors.flip(1)
    sign = torch.sign(vectors[vectors.abs().argmax(0), torch.arange(len(vectors))])  # eigenvectors have no sign of their own
    d = len(variance)
    scale = (variance + 1e-8 * variance.max() + 1e-30).sqrt().float()
    return Basis((vectors * sign).T.float().contiguous(), water_fill(scale.square(), bits * d), scale)


def water_fill(variance: Tensor, total: int) -> tuple[Run, ...]:
    """Runs of bits whose sum over coordinates is ``total``, greedily by what the next bit saves (reverse water-filling)."""
    d = len(variance)
    edges = [*range(0, d, BAND), d]
    sizes = [b - a for a, b in pairwise(edges)]
    weight = [float(variance[a:b].sum()) for a, b in pairwise(edges)]
    width, left = [0] * len(sizes), total
    while True:
        gains = [
            ((weight[i] * (NMSE[width[i]] - NMSE[width[i] + 1])) / sizes[i], i)
            for i in range(len(sizes))
            if width[i] < 8 and sizes[i] <= left
        ]
        if not gains:
            break
        _, i = max(gains, key=lambda pair: (pair[0], -pair[1]))
        width[i] += 1
        left -= sizes[i]
    runs = [(bits, list(bands)) for bits, bands in groupby(range(len(sizes)), key=width.__getitem__)]
    return tuple((edges[bands[0]], edges[bands[-1] + 1], bits) for bits, bands in runs)


@dataclass(frozen=True)
class BasesFile:
    """Calibrated bases by stream name; None for a head that keeps the random rotation."""

    streams: Mapping[str, tuple[Basis | None, ...]]
    bits: int
    model: str = ""  # hash of the model it was calibrated on; empty for none

    def of(self, stream: str | None, d: int, heads: int | None, bits: int, seed: int) -> Bases:
        """The bases of a stream. Raises ValueError for an unknown stream, another width, size or number of heads."""
        if stream is None or stream not in self.streams:
            known = ", ".join(list(self.streams)[:4])
            raise TqaiError(f"the file of bases has no stream {stream!r}; it has {known}, ...: give encode(x, stream=...)")
        if bits != self.bits:
            raise TqaiError(f"the file of bases is for {self.bits} bits, asked for {bits}: calibrate again or use bits={self.bits}")
        found = self.streams[stream]
        if heads is not None and heads % len(found):
            raise TqaiError(f"stream {stream!r} has {len(found)} heads in the file, the tensor has {heads}: give [..., heads, tokens, d]")
        plain = hadamard(d, bits, seed).heads[0]
        out = tuple(plain if basis is None else basis for basis in found)
        if any(basis.matrix.shape[-1] != d for basis in out if basis is not plain):
            raise TqaiError(f"stream {stream!r} has vectors of another size in the file than {d}")
        return Bases(out)

    def check(self, model: nn.Module) -> None:
        """TqaiError if these bases were calibrated on another model, or if the file does not say on which."""
        check_model(model, self.model, "this file of bases")

    def save(self, path: str | Path) -> None:
        """Write safetensors with a JSON header."""
        tensors, header = self.content()
        write_tensors(path, tensors, {FIELD: json.dumps(header)})

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the file; other files may hold them too."""
        tensors: dict[str, Tensor] = {}
        header: dict[str, Any] = {"format": FORMAT, "bits": self.bits, "model": self.model, "streams": {}}
        for name, heads in self.streams.items():
            header["streams"][name] = [None if basis is None else list(map(list, basis.runs)) for basis in heads]
            for i, basis in enumerate(heads):
                if basis is not None and basis.scale is not None:
                    tensors[f"{name}/{i}/matrix"] = basis.matrix.half()
                    tensors[f"{name}/{i}/scale"] = basis.scale
        return tensors, header

    @staticmethod
    def load(path: str | Path) -> BasesFile:
        """Read a file of :meth:`save`. TqaiError names the field that is missing or wrong."""
        again = "calibrate again"
        header, tensors = read_with_header(path, FIELD, FORMAT, what="file of tqai bases", make="run tqai calibrate", again=again)
        checked("Bases", header, what=f"{path}: file of tqai bases", again=again)
        streams = {
            name: tuple(None if runs is None else _basis(tensors, f"{name}/{i}", runs) for i, runs in enumerate(heads))
            for name, heads in header["streams"].items()
        }
        return BasesFile(streams, header["bits"], header["model"])


def _basis(tensors: Mapping[str, Tensor], name: str, given: list[list[int]]) -> Basis:
    again, runs = "calibrate again", tuple((a, b, bits) for a, b, bits in given)
    scale = check_tensor(tensors, f"{name}/scale", (None,), (torch.float32,), again)
    d = len(scale)
    matrix = check_tensor(tensors, f"{name}/matrix", (d, d), (torch.float16,), again).float()
    joined = all(left[1] == right[0] for left, right in pairwise(runs)) and all(a < b for a, b, _ in runs)
    if not joined or runs[0][0] != 0 or runs[-1][1] != d or not any(bits for _, _, bits in runs) or any(bits > 8 for _, _, bits in runs):
        raise TqaiError(f"field 'runs' of {name} does not cover the {d} coordinates of the basis with 0 to 8 bits: {again}")
    norms = matrix.square().sum(1)
    if not bool((scale > 0).all()) or not bool(((norms > 0.9) & (norms < 1.1)).all()):
        raise TqaiError(f"field 'matrix' or 'scale' of {name} is no basis, its axes have not length 1: {again}")
    return Basis(matrix, runs, scale)


_load = once_per_version(BasesFile.load)


def load(path: str, model: nn.Module | None = None) -> BasesFile:
    """A file of bases. TqaiError if ``model`` is given and they are not its."""
    found = _load(path)
    if model is not None:
        found.check(model)
    return found
