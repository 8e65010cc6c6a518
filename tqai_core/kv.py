"""Keys and values of one attention layer, packed as they arrive: torch alone, no model library.

Positions, in order: the first ``sink`` tokens and the last ``recent`` ones are exact, in the model's dtype; between them
lie segments of packed rows (:mod:`codecs.rows`). A token is packed once, when the recent window has passed it, and never
again. Segments of at most 1024 tokens are exactly as large as what they hold, so growing copies a short tail at most.

Keys are stored as (k - mean) / scale, per sequence, head and channel: softmax ignores what is added to all scores of a
query, and q.k is unchanged when q takes the scale. scale = (E k^2 / E q^2)^(1/4), pooled over rotary pairs (i, i + d/2),
takes away outlier channels and key biases, which make plain quantisers fail (Qwen2 at 4 bits). Its statistics need 256
tokens: with 64 they cost more than they gain. Until then everything is held exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .codecs.rows import Rows, rows
from .types import nbytes

SEGMENT = 1024  # tokens of a full segment
FLUSH = 32  # tokens that leave the recent window together
SAMPLE = 1024  # tokens that statistics are taken from, evenly spread


@dataclass(frozen=True)
class Plan:
    """How one layer is kept. ``calibrate``: tokens to wait for before statistics are taken; 0 stores keys as they are."""

    bits_k: int = 4
    bits_v: int = 4
    sink: int = 4
    recent: int = 64
    calibrate: int = 256
    seed: int = 0


@dataclass
class Segment:
    """Packed rows of consecutive tokens: codes ``uint8 [B, H, n, bytes]``, gains ``bf16 [B, H, n]``; all contiguous."""

    codes_k: Tensor
    gain_k: Tensor
    codes_v: Tensor
    gain_v: Tensor

    def __len__(self) -> int:
        return self.gain_k.shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``change(tensor)``, one at a time: the peak is one tensor above what is held."""
        for name, tensor in vars(self).items():
            setattr(self, name, change(tensor).contiguous())

    def join(self, other: Segment) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, torch.cat([tensor, getattr(other, name)], dim=2))


class PackedKV:
    """The cache of one layer. ``append`` new tokens, attend (see :mod:`attention.packed`), then ``settle``.

    ``settle`` packs what has left the recent window. Everything that changes tokens settles first, so that the state does
    not depend on who asks when. ``observe`` gives it queries until the statistics are taken.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clear()

    def clear(self) -> None:
        """Empty, ready for other sequences."""
        self.segments: list[Segment] = []
        self.keys: Tensor | None = None  # exact rows [B, H, sinks + recent, D]
        self.values: Tensor | None = None
        self.length = 0
        self.mean: Tensor | None = None  # fp32 [B, H, 1, D]
        self.scale: Tensor | None = None
        self._q2: Tensor | None = None  # running sum of squares of the queries of each kv head [B, H, 1, D]
        self.exact_why: str | None = None  # set when this layer can no longer pack
        self.decoded = 0  # times dense values were made

    # -- sizes

    @property
    def sinks(self) -> int:
        """Exact rows before the packed ones."""
        return self.plan.sink if self.segments else self.length

    @property
    def packed(self) -> int:
        """Packed tokens."""
        return sum(len(segment) for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, statistics included."""
        return nbytes([[vars(s) for s in self.segments], self.keys, self.values, self.mean, self.scale, self._q2])

    def coder_k(self) -> Rows:
        assert self.keys is not None
        return rows(self.keys.shape[-1], self.plan.bits_k, self.plan.seed, self.keys.device)

    def coder_v(self) -> Rows:
        assert self.values is not None
        return rows(self.values.shape[-1], self.plan.bits_v, self.plan.seed + 1, self.values.device)

    # -- tokens in and out

    def start(self, k: Tensor, v: Tensor) -> None:
        """Fix batch, heads, dimensions, dtype and device by ``k, v [B, H, n, D]``. Raises ValueError for sizes it cannot pack."""
        rows(k.shape[-1], self.plan.bits_k, self.plan.seed, k.device)
        rows(v.shape[-1], self.plan.bits_v, self.plan.seed + 1, v.device)
        self.keys, self.values = k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3])

    def append(self, k: Tensor, v: Tensor) -> None:
        """New tokens ``k [B, H, n, D], v [B, H, n, Dv]`` at the end, exact for now."""
        if self.keys is None or self.values is None:
            self.start(k, v)
        assert self.keys is not None
        assert self.values is not None
        for name, had, new in (("keys", self.keys, k), ("values", self.values, v)):
            if had.shape[:2] != new.shape[:2] or had.shape[3] != new.shape[3]:
                raise ValueError(
                    f"the cache holds {name} [batch, heads, tokens, dim] of {_sizes(had)}, got {_sizes(new)}: it belongs to another "
                    "model or batch; call cache.reset() or make a new one"
                )
        self.settle()
        self.keys = torch.cat([self.keys, k.detach()], dim=2) if self.keys.shape[2] else k.detach()
        self.values = torch.cat([self.values, v.detach()], dim=2) if self.values.shape[2] else v.detach()
        self.length += k.shape[2]

    @property
    def wants_queries(self) -> bool:
        """Whether statistics are still to be taken."""
        return self.plan.calibrate > 0 and self.mean is None and self.exact_why is None

    def observe(self, q: Tensor) -> None:
        """Queries ``[B, heads, n, D]`` that go with the keys; ignored once the statistics are taken."""
        if not self.wants_queries or self.keys is None or q.shape[-1] != self.keys.shape[-1]:
            return
        q = q.detach()[:, :, :: -(-q.shape[2] // SAMPLE)]
        h = self.keys.shape[1]
        grouped = q.float().unflatten(1, (h, -1)).square().sum((2, 3)).unsqueeze(2)
        self._q2 = grouped if self._q2 is None else self._q2 + grouped

    def settle(self) -> None:
        """Pack what has left the recent window, if the statistics are there and at least 32 tokens are due."""
        plan = self.plan
        if self.exact_why or self.keys is None or self.values is None or self.length < plan.calibrate:
            return
        front = plan.sink
        due = self.keys.shape[2] - front - plan.recent
        if due < FLUSH:
            return
        if self.wants_queries:
            self._calibrate(self.keys[:, :, min(plan.sink, self.length - 1) :])
        made = []
        for at in range(front, front + due, SEGMENT):
            size = min(SEGMENT, front + due - at)
            segment, sound = self._encode(self.keys[:, :, at : at + size], self.values[:, :, at : at + size])
            if not sound:
                self.exact_why = f"keys or values of tokens {self.length - self.keys.shape[2] + at} and on hold NaN or inf"
                if not self.segments:
                    self.mean = self.scale = self._q2 = None
                return
            made.append(segment)
        for segment in made:
            self._add(segment)
        keep = lambda x: torch.cat([x[:, :, :front], x[:, :, front + due :]], dim=2)  # noqa: E731
        self.keys, self.values = keep(self.keys), keep(self.values)

    def _add(self, new: Segment) -> None:
        tail = self.segments[-1] if self.segments else None
        if tail is not None and len(tail) + len(new) <= SEGMENT:
            tail.join(new)
        else:
            self.segments.append(new)

    def _encode(self, k: Tensor, v: Tensor) -> tuple[Segment, bool]:
        k = k.float()
        if self.mean is not None and self.scale is not None:
            k = (k - self.mean) / self.scale
        segment = Segment(*self.coder_k().encode(k), *self.coder_v().encode(v.float()))
        return segment, bool((segment.gain_k.isfinite().all() & segment.gain_v.isfinite().all()).item())

    def _calibrate(self, k: Tensor) -> None:
        k = k[:, :, :: -(-k.shape[2] // SAMPLE)].float()
        self.mean = k.mean(2, keepdim=True)
        if self._q2 is None:  # an attention that hid its queries: centred only
            self.scale = torch.ones_like(self.mean)
        else:
            d = k.shape[-1]
            pool = lambda x: x + x.roll(d // 2, -1)  # noqa: E731
            k2, q2 = pool((k - self.mean).square().mean(2, keepdim=True)), pool(self._q2)
            floor = 1e-6  # of the mean: a channel that is always zero must not get an infinite scale
            ratio = (k2 + floor * k2.mean(-1, keepdim=True) + 1e-30) / (q2 + floor * q2.mean(-1, keepdim=True) + 1e-30)
            log = ratio.log() / 4
            self.scale = (log - log.mean(-1, keepdim=True)).exp()
        self._q2 = None

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens. ValueError for more than there are."""
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot crop {count} tokens: the cache keeps {self.length}; crop at most that many, or reset() it")
        self.settle()
        if count == 0 or self.keys is None or self.values is None:
            return
        self.length -= count
        exact = self.keys.shape[2] - (self.plan.sink if self.segments else 0)
        own = min(count, exact)
        self._trim(own)
        count -= own
        while count and self.segments:
            last = self.segments[-1]
            if count >= len(last):
                count -= len(self.segments.pop())
            else:
                left = len(last) - count
                last.map(partial(_first, count=left))
                count = 0
        if count:
            self._trim(count)
        if self.length == 0:
            k, v = self.keys, self.values
            self.clear()
            self.keys, self.values = k, v

    def _trim(self, count: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        if count:
            left = self.keys.shape[2] - count
            self.keys, self.values = _first(self.keys, left), _first(self.values, left)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select sequences: ``change`` is applied to every tensor, whose first dimension is the batch."""
        self.settle()
        for segment in self.segments:
            segment.map(change)
        for name in ("keys", "values", "mean", "scale", "_q2"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    # -- reading

    def dense(self, which: str) -> Tensor:
        """All keys (``"k"``) or values (``"v"``) ``[B, H, tokens, D]`` in the model's dtype, decoded."""
        exact = self.keys if which == "k" else self.values
        assert exact is not None
        if not self.segments:
            return exact
        self.decoded += 1
        front = self.plan.sink
        out = exact.new_empty(*exact.shape[:2], self.length, exact.shape[3])
        out[:, :, :front] = exact[:, :, :front]
        at = front
        for segment in self.segments:
            if which == "k":
                x = self.coder_k().decode(segment.codes_k, segment.gain_k)
                if self.mean is not None and self.scale is not None:
                    x = x * self.scale + self.mean
            else:
                x = self.coder_v().decode(segment.codes_v, segment.gain_v)
            out[:, :, at : at + len(segment)] = x
            at += len(segment)
        out[:, :, at:] = exact[:, :, front:]
        return out

    # -- files

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file; :meth:`restore` reads them back."""
        self.settle()
        names = ("keys", "values", "mean", "scale", "_q2")
        tensors = {name: t for name in names if (t := getattr(self, name)) is not None}
        for i, segment in enumerate(self.segments):
            tensors |= {f"segments.{i}.{name}": t for name, t in vars(segment).items()}
        header = {"length": self.length, "segments": len(self.segments), "exact_why": self.exact_why, "plan": vars(self.plan)}
        return tensors, header

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """What :meth:`state` gave, checked field by field; ValueError names what does not fit."""
        self.clear()
        if header["plan"] != vars(self.plan):
            raise ValueError(f"the file was written with {header['plan']}, this cache is {vars(self.plan)}: give the same config")
        for name in ("keys", "values", "mean", "scale", "_q2"):
            setattr(self, name, tensors.get(name))
        if self.keys is None or self.values is None:
            if header["length"]:
                raise ValueError("field 'keys' or 'values' is missing: save the cache again")
            return
        self.start(self.keys, self.values)
        self.keys, self.values = tensors["keys"], tensors["values"]
        for i in range(header["segments"]):
            parts = []
            for name in ("codes_k", "gain_k", "codes_v", "gain_v"):
                tensor, bits = tensors.get(f"segments.{i}.{name}"), self.coder_k() if name.endswith("k") else self.coder_v()
                if tensor is None:
                    raise ValueError(f"field 'segments.{i}.{name}' is missing: save the cache again")
                wanted = (torch.uint8, bits.row_bytes) if name.startswith("codes") else (torch.bfloat16, None)
                if tensor.dtype != wanted[0] or tensor.shape[:2] != self.keys.shape[:2] or wanted[1] not in (None, tensor.shape[-1]):
                    raise ValueError(f"field 'segments.{i}.{name}' is {tensor.dtype} {tuple(tensor.shape)}: save the cache again")
                parts.append(tensor)
            self.segments.append(Segment(*parts))
        self.length, self.exact_why = header["length"], header["exact_why"]
        if self.packed + self.keys.shape[2] != self.length:
            raise ValueError(
                f"field 'length' says {self.length}, the tensors hold {self.packed + self.keys.shape[2]}: save the cache again"
            )


def _first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :count].clone()  # a view would keep the rest alive


def _sizes(x: Tensor) -> list[int]:
    return list(x.shape)
