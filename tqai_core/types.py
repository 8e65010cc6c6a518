"""What travels between the stages. Every word here is defined in the README's glossary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TqaiError
from .files import check_finite, checked, header_of, parse_tensors, read_tensors, write_tensors
from .registry import build

FORMAT = 1  # of a saved Packed; a reader refuses newer ones
MOST = 2**40  # numbers of a packed tensor
AGAIN = "save the tensor again"
SAME = 1e-6  # difference of two sigmas that differ by rounding alone
BEND = 0.1  # below this sigma an output bends too sharply for a parabola: a correction would add more error than it removes


@dataclass(frozen=True)
class Step:
    """One denoiser evaluation. ``index`` counts evaluations from 0, ``sigma`` is the time (1 = noise, 0 = clean).

    ``width`` is the sampler's step in sigma from here, relative to the mean step of the schedule: what an error made
    here weighs in the result. 1 where the schedule is unknown. ``next`` is the sigma after it, given for samplers that evaluate each
    sigma of their schedule once and add up outputs (Euler, and the multistep solvers): there an earlier error can be corrected.
    """

    index: int
    sigma: float
    total: int | None = None
    last: bool = False
    width: float = 1.0
    next: float | None = None

    @property
    def near_end(self) -> bool:
        """Whether an error made here stays in the result: the next step is too near to the end to correct it."""
        return min(self.sigma, self.sigma if self.next is None else self.next) < BEND

    def repeats(self, sigma: float | None) -> bool:
        """Whether this is the same sigma: samplers that come back to one compute it anew, with another rounding."""
        return sigma is not None and abs(self.sigma - sigma) < SAME


@dataclass(frozen=True)
class Where:
    """The key of a stream: a site (``model``, ``block.3``, ``attn.3``), a guidance branch and a kind of tensor."""

    site: str
    branch: str = "cond"
    kind: str = "out"

    def __str__(self) -> str:
        return f"{self.site}/{self.branch}/{self.kind}"


@dataclass(frozen=True)
class Decision:
    """What the monitor wants of a step. ``error_estimate`` is the relative error a forecast would have, if known, ``tolerance``
    the most that it may have, where there is such a bound."""

    compute: bool
    why: str
    error_estimate: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Part:
    """A tensor that a strategy wants to keep; ``bits`` overrides the codec's own width."""

    tensor: Tensor
    bits: int | None = None


@dataclass(frozen=True)
class Packed:
    """A tensor as a codec holds it: only what must stay alive to decode it.

    ``codec`` is the spec that decodes it, ``shape`` the original shape, ``tensors`` the payload and all side
    information. Tables that a seed can rebuild (rotations, levels) are not part of it.
    """

    codec: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor kept, side information included."""
        return nbytes(self.tensors)

    def save(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text metadata as ``safetensors.torch.save_file`` wants them."""
        header = {"format": FORMAT, "codec": self.codec, "shape": list(self.shape), "meta": dict(self.meta)}
        return {k: v.contiguous() for k, v in self.tensors.items()}, {"tqai": json.dumps(header)}

    @staticmethod
    def load(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Packed:
        """The reverse of :meth:`save`. Raises ValueError naming the field that is missing or wrong."""
        if not metadata or "tqai" not in metadata:
            raise TqaiError("metadata field 'tqai' is missing: this is no tensor packed by tqai; save it with Packed.save()")
        header = header_of(metadata, "tqai", what="packed tensor", again=AGAIN)
        version = header.get("format") if isinstance(header, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise TqaiError(f"field 'format' is {version!r}, this tqai reads up to {FORMAT}: upgrade tqai-core")
        checked("Packed", header, what="packed tensor", again=AGAIN)
        packed = Packed(header["codec"], tuple(header["shape"]), dict(tensors), header["meta"])
        if math.prod(n or 1 for n in packed.shape) > MOST:
            raise TqaiError(f"field 'shape' is {list(packed.shape)}, more than {MOST:,} numbers: {AGAIN}")
        check_finite(packed.tensors, what="packed tensor", again=AGAIN)
        build("codec", packed.codec).verify(packed)
        return packed

    def write(self, path: str | Path) -> None:
        """Write a safetensors file."""
        write_tensors(path, *self.save())

    @staticmethod
    def read(path: str | Path) -> Packed:
        """Read a file of :meth:`write`; TqaiError for a truncated, corrupted or foreign one."""
        metadata, tensors = read_tensors(path, what="packed tensor", again=AGAIN)
        return Packed.load(tensors, metadata)

    @staticmethod
    def from_bytes(blob: bytes) -> Packed:
        """The content of a file of :meth:`write`."""
        metadata, tensors = parse_tensors(blob, what="packed tensor", again=AGAIN)
        return Packed.load(tensors, metadata)


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Every tensor that ``thing`` keeps alive: through mappings, sequences, packed tensors and plain objects."""
    if hasattr(thing, "__tensor_flatten__"):  # a wrapper around others (torchao, quanto) has no storage of its own
        for name in thing.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(thing, name))
    elif isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (Mapping, list, tuple)):
        for value in thing.values() if isinstance(thing, Mapping) else thing:
            yield from tensors_in(value)
    elif hasattr(thing, "__dict__"):
        yield from tensors_in(vars(thing))


def nbytes(thing: object) -> int:
    """Bytes of the distinct storages under ``thing``: a view counts its whole base, shared storage counts once."""
    seen: dict[int, int] = {}
    for tensor in tensors_in(thing):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def signature(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What must not change within a stream."""
    return x.shape, x.dtype, x.device
