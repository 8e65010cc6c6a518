"""Keys and values of some tokens in all layers, packed into one block: the form in which a store of prefixes holds them.

A block knows no engine and needs no other block. Keys are coded as differences to the block's own mean, and divided by the scale that a
calibration found for their channels; the first tokens of a sequence (sinks) stay exact and out of the mean, which they would
spoil. The payload is a record for each layer, layers of equal bits together:

    keys: codes ``uint8 [H, N, bytes]``, gains, mean ``bf16 [H, D]``, sinks ``[H, sinks, D]`` (of a first block);  values: the same, no mean

Codes are rows of :mod:`codecs.rows`. Up to 6 bits a gain is one byte on a logarithmic scale, whose span ``fp16 [H, 2]`` (octave of the
lowest, step) precedes them; its error is small beside that of the codes. At 8 bits it is ``bf16``. 16 bits are the numbers themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from ..codecs.rows import BITS, Scratch, rows
from ..errors import TqaiError
from .bits import EXACT
from .envelope import Envelope, Miss

LEAST_TOKENS = 64  # of a block: the key mean of fewer costs more bits than it saves
TOGETHER = 1 << 17  # numbers that are decoded at a time, so that they stay in the CPU's cache
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
OCTAVES = 100  # no number of a cache is larger than 2 to this
NOT_FINITE = "keys or values have NaN or inf: the block is not stored"
TOP = 254  # steps of a gain; code 0 is a row of zeros


@dataclass(frozen=True)
class BlockFormat:
    """All that changes the meaning of a block's bytes; it makes the header, and so the folder.

    ``bits_k`` and ``bits_v`` are by layer. ``model`` names the weights; ``calibration`` is the hash of the scales of the keys.
    """

    model: str
    dtype: str
    heads: int
    tokens: int
    dim: int
    bits_k: tuple[int, ...]
    bits_v: tuple[int, ...]
    sinks: int = 4
    centre: bool = True
    seed: int = 0
    calibration: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TqaiError(f"a cache of {self.dtype} cannot be packed: only {', '.join(DTYPES)}")
        if self.tokens < LEAST_TOKENS:
            raise TqaiError(f"blocks of {self.tokens} tokens asked; the mean of their keys pays from {LEAST_TOKENS} on: take larger ones")
        if not 0 <= self.sinks < self.tokens or not self.bits_k or len(self.bits_k) != len(self.bits_v):
            raise TqaiError(
                f"sinks={self.sinks} of {self.tokens} tokens, bits of {len(self.bits_k)} and {len(self.bits_v)} layers: no block"
            )
        if wrong := sorted({*self.bits_k, *self.bits_v} - {*BITS, EXACT}):
            raise TqaiError(f"{wrong[0]} bits asked; a block has {', '.join(map(str, BITS))} or {EXACT} (exact) bits")
        for bits in {*self.bits_k, *self.bits_v} - {EXACT}:
            rows(self.dim, bits, self.seed, torch.device("cpu"))  # refuses head dimensions that it cannot code

    @property
    def layers(self) -> int:
        return len(self.bits_k)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the tensor that a block holds: keys and values, layers, heads, tokens, coordinates."""
        return 2, self.layers, self.heads, self.tokens, self.dim

    @property
    def nbytes(self) -> int:
        """Of that tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def fields(self) -> dict[str, object]:
        """The header."""
        return {
            "kind": "rows", "model": self.model, "dtype": self.dtype, "shape": list(self.shape), "bits_k": list(self.bits_k),
            "bits_v": list(self.bits_v), "sinks": self.sinks, "centre": self.centre, "seed": self.seed, "calibration": self.calibration,
        }  # fmt: skip

    @cached_property
    def groups(self) -> list[tuple[int, int, list[int]]]:
        """Bits of keys, bits of values, and the layers that have them."""
        order = sorted(range(self.layers), key=lambda i: (self.bits_k[i], self.bits_v[i], i))
        return [(*bits, list(some)) for bits, some in groupby(order, key=lambda i: (self.bits_k[i], self.bits_v[i]))]


@dataclass(frozen=True)
class Field:
    """A part of a layer's record. ``shape`` is of one layer."""

    which: int  # 0: keys, 1: values
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes in a record: the next field begins at a multiple of 4."""
        return -(-self.nbytes // 4) * 4


Parts = dict[tuple[int, str], Tensor]


class BlockCoder:
    """``[2, L, H, N, D]`` -> bytes -> the same with its error. ``scale fp32 [L, H, D]``: keys are divided by it. Threads may share it."""

    def __init__(self, format: BlockFormat, scale: Tensor | None = None, secret: bytes = b"") -> None:
        if scale is not None and tuple(scale.shape) != (format.layers, format.heads, format.dim):
            raise TqaiError(f"key scales {list(scale.shape)} do not fit {format.layers} layers of {format.heads} heads of {format.dim}")
        self.format, self.scale, self.envelope = format, scale, Envelope(format.fields, secret)
        self.dtype = DTYPES[format.dtype]
        self._local = threading.local()
        self._records = {
            (bits_k, bits_v, first): [f for which, bits in enumerate((bits_k, bits_v)) for f in self._fields(which, bits, first)]
            for bits_k, bits_v, _ in format.groups
            for first in (False, True)
        }

    @property
    def shape(self) -> tuple[int, ...]:
        return self.format.shape

    def _fields(self, which: int, bits: int, first: bool) -> Iterator[Field]:
        h, n, d = self.format.heads, self.format.tokens, self.format.dim
        if bits == EXACT:
            yield Field(which, "exact", (h, n, d), self.dtype)
            return
        if which == 0 and self.format.centre:
            yield Field(which, "mean", (h, 1, d), torch.bfloat16)
        if first and self.format.sinks:
            yield Field(which, "sink", (h, self.format.sinks, d), self.dtype)
        if bits == 8:
            yield Field(which, "gain", (h, n), torch.bfloat16)
        else:
            yield Field(which, "span", (h, 2), torch.float16)
        yield Field(which, "codes", (h, n, d * bits // 8), torch.uint8)
        if bits != 8:
            yield Field(which, "gain", (h, n), torch.uint8)

    def size(self, first: bool) -> int:
        """Bytes of a block."""
        records = ((len(layers), self._records[bits_k, bits_v, first]) for bits_k, bits_v, layers in self.format.groups)
        return self.envelope.overhead + sum(n * _room(fields) for n, fields in records)

    def _parts(self, payload: Tensor, first: bool) -> Iterator[tuple[int, int, list[int], Parts]]:
        """Each group of layers with views ``[layers, *shape]`` of its fields."""
        at = 0
        for bits_k, bits_v, layers in self.format.groups:
            fields, inside = self._records[bits_k, bits_v, first], 0
            record = _room(fields)
            table = payload[at : at + record * len(layers)].view(len(layers), record)
            found: Parts = {}
            for field in fields:
                found[field.which, field.name] = table[:, inside : inside + field.nbytes].view(field.dtype).unflatten(1, field.shape)
                inside += field.room
            at += record * len(layers)
            yield bits_k, bits_v, layers, found

    # -- in

    def encode(self, kv: Tensor, key: bytes, first: bool) -> bytearray:
        """``kv [2, L, H, *tokens, D]`` of any strides, under the name ``key``. :class:`Miss` where it has NaN or inf."""
        sinks = self.format.sinks if first else 0
        data = bytearray(self.size(first))
        payload = torch.frombuffer(data, dtype=torch.uint8)[self.envelope.overhead :]
        for bits_k, bits_v, layers, parts in self._parts(payload, first):
            for which, bits in enumerate((bits_k, bits_v)):
                for some, span in self._together(layers):
                    own = {name: part[span] for (of, name), part in parts.items() if of == which}
                    x = kv[which][some].reshape(len(some), self.format.heads, self.format.tokens, self.format.dim)
                    if bits == EXACT:
                        own["exact"].copy_(x)
                    else:
                        self._encode(x, which, bits, some, sinks, own)
        self.envelope.seal(data, key, first)
        return data

    def _encode(self, x: Tensor, which: int, bits: int, layers: list[int], sinks: int, own: dict[str, Tensor]) -> None:
        if sinks:
            own["sink"].copy_(x[:, :, :sinks])
            if not bool(own["sink"].isfinite().all()):
                raise Miss(NOT_FINITE)
        x = x.float()
        if "mean" in own:
            own["mean"].copy_(x[:, :, sinks:].mean(2, keepdim=True))
            x = x - own["mean"].float()
        if which == 0 and self.scale is not None:
            x = x / self.scale[layers][:, :, None]
        if sinks:
            x = x.clone()
            x[:, :, :sinks] = 0  # they are held beside; they must not widen the span of the gains
        codes, gain = rows(self.format.dim, bits, self.format.seed + which, x.device).encode(x)
        if not bool(gain.isfinite().all()):
            raise Miss(NOT_FINITE)
        own["codes"].copy_(codes)
        if bits == 8:
            own["gain"].copy_(gain)
            return
        log = gain.float().clamp_min(0).log2()
        zero = log.isinf()
        low = log.masked_fill(zero, torch.inf).amin(-1, keepdim=True).half().float().nan_to_num(posinf=0.0)
        high = log.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        step = ((high - low) / TOP).clamp_min(1e-4).half().float()
        own["span"].copy_(torch.cat([low, step], -1))
        own["gain"].copy_(((log - low) / step).round().clamp(0, TOP).add(1).masked_fill(zero, 0))

    # -- out

    def decode(self, data: bytearray, key: bytes, out: Tensor) -> None:
        """Write the block ``key`` into ``out [2, L, H, *tokens, D]`` of any strides, the tokens in one or two dimensions. :class:`Miss`,
        and ``out`` untouched, for bytes that are not that block, whole and of this format."""
        view, first = self.envelope.open(data, key)
        if len(data) != self.size(first):
            raise Miss(f"{len(data):,} bytes, a block of this format has {self.size(first):,}")
        groups = list(self._parts(torch.frombuffer(view, dtype=torch.uint8), first))
        if not all(_in_range(name, part) for *_, parts in groups for (_, name), part in parts.items()):
            raise Miss("damaged: it has numbers out of range, NaN or inf")
        for bits_k, bits_v, layers, parts in groups:
            for which, bits in enumerate((bits_k, bits_v)):
                for some, span in self._together(layers):
                    own = {name: part[span] for (of, name), part in parts.items() if of == which}
                    x = own["exact"] if bits == EXACT else self._decode(own, which, bits, some)
                    sinks = own.get("sink")
                    self._write(out[which], x.unflatten(2, out.shape[3:-1]), some)
                    if sinks is not None:
                        self._write_sinks(out[which], sinks, some)

    def _decode(self, own: dict[str, Tensor], which: int, bits: int, layers: list[int]) -> Tensor:
        """``fp32 [layers, H, N, D]`` in memory that the next call overwrites."""
        scratch = self._scratch
        coder = rows(self.format.dim, bits, self.format.seed + which, torch.device("cpu"))
        levels = coder.lookup(own["codes"], scratch)
        if bits == 8:
            gain = own["gain"].float()
        else:
            low, step = own["span"].float().split(1, -1)
            code = own["gain"].float()
            gain = torch.addcmul(low - step, code, step).exp2_().mul_(code.ne(0))
        levels.mul_(gain[..., None])
        back = coder.back
        if which == 0 and self.scale is not None:
            back = back * self.scale[layers].flatten(0, 1)[:, None]
        out = scratch.take("dense", levels.shape)
        flat, y = out.flatten(0, 1), levels.flatten(0, 1)
        if "mean" in own:
            torch.baddbmm(own["mean"].float().flatten(0, 1), y, back.expand(len(y), -1, -1), out=flat)
        elif back.ndim == 2:
            torch.mm(y.flatten(0, 1), back, out=flat.flatten(0, 1))
        else:
            torch.bmm(y, back, out=flat)
        return out

    @property
    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    def _together(self, layers: list[int]) -> Iterator[tuple[list[int], slice]]:
        """Layers that are worked on at a time, and their places in the group."""
        most = max(TOGETHER // (self.format.heads * self.format.tokens * self.format.dim), 1)
        for at in range(0, len(layers), most):
            yield layers[at : at + most], slice(at, at + most)

    def _write(self, out: Tensor, x: Tensor, layers: list[int]) -> None:
        if layers[-1] - layers[0] == len(layers) - 1:
            out[layers[0] : layers[-1] + 1].copy_(x)
        else:
            for layer, own in zip(layers, x, strict=True):
                out[layer].copy_(own)

    def _write_sinks(self, out: Tensor, sinks: Tensor, layers: list[int]) -> None:
        """Into the first tokens of ``out [L, H, *tokens, D]``, whose tokens may lie in several dimensions."""
        for i in range(sinks.shape[2]):
            place = out[:, :, i] if out.ndim == 4 else out[:, :, i // out.shape[3], i % out.shape[3]]
            self._write(place, sinks[:, :, i], layers)


def _in_range(name: str, part: Tensor) -> bool:
    """Whether what codes are multiplied with is finite, and so what comes out."""
    if part.dtype == torch.uint8 or name == "exact":
        return True
    if name == "span":
        return bool((part[..., 0].float() + TOP * part[..., 1].float()).abs().amax() < OCTAVES)
    return bool(part.abs().amax() < 2.0**OCTAVES)


def _room(fields: list[Field]) -> int:
    return sum(field.room for field in fields)


class RawCoder:
    """Bytes as they are, in the same envelope: for caches that are not rows of keys and values, such as those of linear attention."""

    def __init__(self, model: str, dtype: str, nbytes: int, secret: bytes = b"") -> None:
        self.nbytes, self.shape = nbytes, (nbytes,)
        self.envelope = Envelope({"kind": "raw", "model": model, "dtype": dtype, "shape": [nbytes]}, secret)

    def encode(self, kv: Tensor, key: bytes, first: bool) -> bytearray:
        """``kv uint8 [nbytes]``."""
        data = bytearray(self.envelope.overhead + self.nbytes)
        torch.frombuffer(data, dtype=torch.uint8)[self.envelope.overhead :].copy_(kv)
        self.envelope.seal(data, key, first)
        return data

    def decode(self, data: bytearray, key: bytes, out: Tensor) -> None:
        """Into ``out uint8 [nbytes]``; :class:`Miss` as of :class:`BlockCoder`."""
        view, _ = self.envelope.open(data, key)
        if len(view) != self.nbytes:
            raise Miss(f"{len(view):,} bytes, a block of this format has {self.nbytes:,}")
        out.copy_(torch.frombuffer(view, dtype=torch.uint8))
