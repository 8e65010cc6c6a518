"""What is held between evaluations: one :class:`Stream` a site, branch and kind, coded parts only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention.token_order import TileOrder
from .registry import build
from .roles import Codec
from .types import Packed, Part, Step, Where, nbytes, signature

VECTOR = 128  # coordinates a vector when a tensor's own last dimension is no good one


@dataclass
class Stream:
    """The history of one tensor over evaluations. ``value("slope")`` decodes a held part, fp32, in the tensor's shape."""

    codec: Codec
    where: Where | None = None
    grid: tuple[int, ...] = ()  # of the tokens, where the host knows it: (length,), (height, width) or (frames, height, width)
    step: Step | None = None
    parts: dict[str, Packed] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    kind: tuple[torch.Size, torch.dtype, torch.device] | None = None
    decoded: dict[str, Tensor] = field(default_factory=dict)  # within one visit only: emptied before it ends
    count: int = 0  # values seen
    offload_device: torch.device | None = None  # where the coded parts lie; None: where they were made

    def hold(self, parts: dict[str, Part], x: Tensor, step: Step) -> None:
        """Replace what is held by the parts of ``x``, the exact value at ``step``."""
        self.parts = {name: self._pack(part) for name, part in parts.items()}
        self.shapes = {name: part.tensor.shape for name, part in parts.items()}
        self.step, self.kind, self.count = step, signature(x), self.count + 1
        self.decoded.clear()

    def value(self, name: str) -> Tensor | None:
        """The decoded part, or None if it is not held. Read it, do not write it: it may be asked for again."""
        packed = self.parts.get(name)
        if packed is None:
            return None
        if name in self.decoded:
            return self.decoded[name]
        shape = self.shapes[name]
        if self.offload_device is not None and self.kind is not None:
            packed = _moved(packed, self.kind[2])
        flat = build("codec", packed.codec).decode(packed, torch.float32)
        self.decoded[name] = flat if flat.shape == shape else flat.flatten()[: shape.numel()].view(shape)
        return self.decoded[name]

    def move(self, device: torch.device | None) -> None:
        """Keep the coded parts on ``device`` from now on, or where the tensors are; they visit the tensors' device to be decoded."""
        to = device if device is not None else self.kind[2] if self.kind is not None else None
        if to is not None:
            self.parts = {name: _moved(packed, to) for name, packed in self.parts.items()}
        self.offload_device = device

    @property
    def nbytes(self) -> int:
        """Bytes of the coded parts, of the scorer's state, and of anything decoded that was left alive."""
        return nbytes(self.tensors)

    @property
    def tensors(self) -> list[Any]:
        return [[p.tensors for p in self.parts.values()], self.state, self.decoded]

    def _pack(self, part: Part) -> Packed:
        codec = self.codec if part.bits is None else _changed(self.codec, bits=part.bits)
        x = part.tensor.detach()
        if codec.name != "exact" and not 32 <= x.shape[-1] <= 1024:
            flat = x.flatten()  # latents [b, c, h, w]: short rows would pay a gain each
            x = F.pad(flat, (0, -flat.numel() % VECTOR)).view(-1, VECTOR)
            codec = _changed(codec, mean="never")  # vectors cut from a latent have no common mean
        packed = codec.encode_stream(f"{self.where.site}/{self.where.kind}" if self.where else "", x)
        return packed if self.offload_device is None else _moved(packed, self.offload_device)


class Memory:
    """All streams of one model in one generation."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.grid: tuple[int, ...] = ()
        self.token_order: TileOrder | None = None  # in which the tokens lie during the current model call; None: as the model has them
        self.offload_device: torch.device | None
        self.clear()

    def __getitem__(self, where: Where) -> Stream:
        if where not in self.streams:
            self.streams[where] = Stream(self.codec, where, self.grid, offload_device=self.offload_device)
        return self.streams[where]

    def count(self, where: Where, copies: int) -> int:
        """Count the bytes of one stream after it changed. ``counted`` and ``exact`` are the sums over all streams."""
        stream = self.streams[where]
        held, exact = stream.nbytes, (stream.kind[0].numel() * 2 * copies if stream.kind else 0)
        before = self._bytes.get(where, (0, 0))
        self._bytes[where] = held, exact
        self.counted += held - before[0]
        self.exact += exact - before[1]
        return held

    def put(self, where: Where, stream: Stream, copies: int) -> None:
        """``stream`` in place of that of ``where``."""
        stream.move(self.offload_device)
        self.streams[where] = stream
        self.count(where, copies)

    def drop(self, where: Where) -> None:
        self.streams.pop(where, None)
        held, exact = self._bytes.pop(where, (0, 0))
        self.counted -= held
        self.exact -= exact

    def keep(self, step: Step) -> None:
        """Drop the streams that have no value of ``step``."""
        for where in [where for where, s in self.streams.items() if s.step is None or s.step.index != step.index]:
            self.drop(where)

    def offload(self, device: torch.device) -> None:
        """Keep the coded parts on ``device`` until :meth:`clear`; they visit the model's device to be decoded."""
        self.offload_device = device
        for stream in self.streams.values():
            stream.move(device)

    def __iter__(self) -> Iterator[Where]:
        return iter(self.streams)

    def clear(self) -> None:
        self.streams: dict[Where, Stream] = {}
        self._bytes: dict[Where, tuple[int, int]] = {}
        self.counted = self.exact = 0  # bytes held, and what fp16 copies would take
        self.offload_device = None

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams.values())


def _moved(packed: Packed, device: torch.device) -> Packed:
    return dataclasses.replace(packed, tensors={name: t.to(device) for name, t in packed.tensors.items()})


def _changed(codec: Codec, **options: Any) -> Codec:
    """The codec with those of the options that it has."""
    known = {key: value for key, value in options.items() if hasattr(codec, key)}
    return dataclasses.replace(codec, **known) if known else codec  # type: ignore[type-var]
