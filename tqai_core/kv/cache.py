"""Keys and values of one attention layer, packed as they arrive: torch alone, no model library.

Positions, in order: the first ``sink`` tokens and the last ``recent`` ones are exact, in the model's dtype; between them
lie segments of packed rows (:mod:`codecs.rows`). A token is packed once, when the recent window has passed it, and never
again. Segments of at most 1024 tokens are exactly as large as what they hold, so growing copies a short tail at most.

Keys are stored as (k - mean) / scale, per sequence, head and channel: softmax ignores what is added to all scores of a
query, and q.k is unchanged when q takes the scale. scale = (E k^2 / E q^2)^(1/4), pooled over rotary pairs (i, i + d/2),
takes away outlier channels and key biases, which make plain quantisers fail (Qwen2 at 4 bits). Its statistics need 256
tokens: with 64 they cost more than they gain. Until then everything is held exact. Values get axes of their own where that
pays (:mod:`codecs.split`).

A scorer, strategy or monitor (:mod:`kv_methods`) may give some tokens finer rows, which then lie in segments of their own,
store keys as residuals, or choose what a step reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codecs import split
from ..codecs.rows import Rows, rows
from ..codecs.split import Split
from ..errors import TqaiError
from ..types import nbytes

if TYPE_CHECKING:
    from .policy import Policy

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
    """Packed rows of consecutive tokens: codes ``uint8 [B, H, n, bytes]``, gains ``bf16 [B, H, n]``, of split values
    ``[B, H, n, 2]``; all contiguous."""

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

    def __init__(self, plan: Plan, policy: Policy | None = None) -> None:
        self.plan, self.policy = plan, policy
        self.clear()

    def clear(self) -> None:
        """Empty, ready for other sequences."""
        self.segments: list[Segment] = []
        self.fine: list[Segment] = []  # rows of more bits, where a policy gives some tokens those
        self.keys: Tensor | None = None  # exact rows [B, H, sinks + recent, D]
        self.values: Tensor | None = None
        self.length = 0
        self.mean: Tensor | None = None  # fp32 [B, H, 1, D]
        self.scale: Tensor | None = None
        self.basis: Tensor | None = None  # axes of the values int8 [H, r, D], of all sequences alike
        self.bits_v: tuple[int, ...] = (self.plan.bits_v,)  # of the parts of a row
        self._coder_v: Split | None = None
        self._q2: Tensor | None = None  # running sum of squares of the queries of each kv head [B, H, 1, D]
        self.exact_why: str | None = None  # set when this layer can no longer pack
        self.decoded = 0  # times dense values were made
        if self.policy is not None:
            self.policy.clear()

    # -- sizes

    @property
    def sinks(self) -> int:
        """Exact rows before the packed ones."""
        return self.plan.sink if self.packed else self.length

    @property
    def packed(self) -> int:
        """Packed tokens."""
        return sum(map(len, self.segments)) + sum(map(len, self.fine))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, statistics included."""
        methods = None if self.policy is None else [self.policy.tensors, self.policy.states]
        statistics = [self.mean, self.scale, self.basis, self._q2]
        return nbytes([[vars(s) for s in (*self.segments, *self.fine)], self.keys, self.values, statistics, methods])

    def coder_k(self) -> Rows:
        assert self.keys is not None
        return rows(self.keys.shape[-1], self.plan.bits_k, self.plan.seed, self.keys.device)

    def coder_v(self) -> Rows | Split:
        assert self.values is not None
        if self.basis is not None:
            if self._coder_v is None or self._coder_v.basis is not self.basis:
                self._coder_v = Split(self.values.shape[-1], (self.bits_v[0], self.bits_v[-1]), self.basis, self.plan.seed + 1)
            return self._coder_v
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
                raise TqaiError(
                    f"the cache holds {name} [batch, heads, tokens, dim] of {_sizes(had)}, got {_sizes(new)}: it belongs to another "
                    "model or batch; call cache.reset() or make a new one"
                )
        self.settle()
        self.keys = torch.cat([self.keys, k.detach()], dim=2) if self.keys.shape[2] else k.detach()
        self.values = torch.cat([self.values, v.detach()], dim=2) if self.values.shape[2] else v.detach()
        self.length += k.shape[2]

    @property
    def wants_statistics(self) -> bool:
        """Whether statistics are still to be taken."""
        return self.plan.calibrate > 0 and self.mean is None and self.exact_why is None

    @property
    def wants_queries(self) -> bool:
        """Whether queries are asked for: by the statistics, or by a method at all times."""
        return self.wants_statistics or (self.exact_why is None and self.policy is not None and self.policy.queries_wanted > 0)

    def observe(self, q: Tensor) -> None:
        """Queries ``[B, heads, n, D]`` that go with the keys; ignored once nobody asks for them."""
        if not self.wants_queries or self.keys is None or q.shape[-1] != self.keys.shape[-1]:
            return
        if self.policy is not None:
            self.policy.observe(q)
        if not self.wants_statistics:
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
        if self.policy is not None:
            due = self.policy.due(due, self.packed)
        if due < FLUSH:
            return
        if self.wants_statistics:
            start = min(plan.sink, self.length - 1)
            self._calibrate(self.keys[:, :, start:], self.values[:, :, start:])
        if self.policy is not None:
            self._pack_by(self.policy, front, due)
            return
        made = []
        for at in range(front, front + due, SEGMENT):
            size = min(SEGMENT, front + due - at)
            segment, sound = self._encode(self.keys[:, :, at : at + size], self.values[:, :, at : at + size])
            if not sound:
                self.exact_why = f"keys or values of tokens {self.length - self.keys.shape[2] + at} and on hold NaN or inf"
                if not self.segments:
                    self.mean = self.scale = self.basis = self._q2 = None
                return
            made.append(segment)
        for segment in made:
            self.add(self.segments, segment)
        self._forget(front, due)

    def _pack_by(self, policy: Policy, front: int, due: int) -> None:
        """The same as the methods want it, a flush at a time."""
        done = 0
        while done < due:
            size = policy.size(due - done, self.packed)
            if not policy.pack(self, front + done, size):
                assert self.keys is not None
                self.exact_why = f"keys or values of tokens {self.length - self.keys.shape[2] + front} and on hold NaN or inf"
                break
            done += size
        self._forget(front, done)
        if not self.packed:
            self.mean = self.scale = self.basis = self._q2 = None

    def _forget(self, front: int, count: int) -> None:
        """Drop ``count`` exact rows after the first ``front``."""
        assert self.keys is not None
        assert self.values is not None
        keep = lambda x: torch.cat([x[:, :, :front], x[:, :, front + count :]], dim=2)  # noqa: E731
        self.keys, self.values = keep(self.keys), keep(self.values)

    @staticmethod
    def add(segments: list[Segment], new: Segment) -> None:
        """Put rows at the end of ``segments``."""
        tail = segments[-1] if segments else None
        if tail is not None and len(tail) + len(new) <= SEGMENT:
            tail.join(new)
        else:
            segments.append(new)

    @staticmethod
    def cut(segments: list[Segment], count: int) -> None:
        """Keep the first ``count`` rows of ``segments``."""
        extra = sum(map(len, segments)) - count
        while extra > 0:
            last = segments[-1]
            if extra >= len(last):
                extra -= len(segments.pop())
            else:
                last.map(partial(_first, count=len(last) - extra))
                extra = 0

    def stored(self, k: Tensor) -> Tensor:
        """Keys as they are packed, fp32: centred and scaled."""
        return k.float() if self.mean is None or self.scale is None else (k.float() - self.mean) / self.scale

    def _encode(self, k: Tensor, v: Tensor) -> tuple[Segment, bool]:
        return self.rows_of(self.stored(k), v.float(), self.coder_k(), self.coder_v())

    @staticmethod
    def rows_of(k: Tensor, v: Tensor, coder_k: Rows, coder_v: Rows | Split) -> tuple[Segment, bool]:
        """Rows of keys in their stored form and of values, and whether all of them are numbers."""
        segment = Segment(*coder_k.encode(k), *coder_v.encode(v))
        return segment, bool((segment.gain_k.isfinite().all() & segment.gain_v.isfinite().all()).item())

    def _calibrate(self, k: Tensor, v: Tensor) -> None:
        found = split.plan(v[:, :, :: -(-v.shape[2] // SAMPLE)].float(), self.plan.bits_v, self.length)
        if found is not None:
            self.bits_v, self.basis = found
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
            raise TqaiError(f"cannot crop {count} tokens: the cache keeps {self.length}; crop at most that many, or reset() it")
        self.settle()
        if count == 0 or self.keys is None or self.values is None:
            return
        self.length -= count
        exact = self.keys.shape[2] - (self.plan.sink if self.packed else 0)
        own = min(count, exact)
        self._trim(own)
        count -= own
        if count and self.packed:
            gone = min(count, self.packed)
            self._crop_packed(self.packed - gone)
            count -= gone
        if count:
            self._trim(count)
        if self.length == 0:
            k, v = self.keys, self.values
            self.clear()
            self.keys, self.values = k, v

    def _crop_packed(self, left: int) -> None:
        """Keep ``left`` packed tokens. Where a policy can cut only before that, the tokens between become exact rows again,
        decoded."""
        if self.policy is None:
            self.cut(self.segments, left)
            return
        assert self.keys is not None
        assert self.values is not None
        whole, front = self.policy.boundary(left), self.plan.sink
        between = [self.dense(which)[:, :, front + whole : front + left] for which in "kv"] if whole < left else []
        self.policy.crop(self, whole)
        if between:
            self.keys, self.values = (torch.cat(pair, 2) for pair in zip((self.keys, self.values), between, strict=True))

    def _trim(self, count: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        if count:
            left = self.keys.shape[2] - count
            self.keys, self.values = _first(self.keys, left), _first(self.values, left)

    def move(self, device: torch.device | str) -> None:
        """Everything to another device, without waiting for it."""
        self.map_batch(lambda x: x.to(device, non_blocking=True))
        self.basis = None if self.basis is None else self.basis.to(device, non_blocking=True)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select sequences: ``change`` is applied to every tensor whose first dimension is the batch."""
        self.settle()
        for segment in (*self.segments, *self.fine):
            segment.map(change)
        if self.policy is not None:
            self.policy.map_batch(change)
        for name in ("keys", "values", "mean", "scale", "_q2"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    # -- reading

    def dense(self, which: str) -> Tensor:
        """All keys (``"k"``) or values (``"v"``) ``[B, H, tokens, D]`` in the model's dtype, decoded."""
        exact = self.keys if which == "k" else self.values
        assert exact is not None
        if not self.packed:
            return exact
        self.decoded += 1
        front = self.plan.sink
        out = exact.new_empty(*exact.shape[:2], exact.shape[2] + self.packed, exact.shape[3])
        out[:, :, :front] = exact[:, :, :front]
        end = front + self.packed
        if self.policy is None:
            self._decode(which, out[:, :, front:end])
        else:
            guess = self.policy.predicted(self) if which == "k" else None
            middle = out.new_empty(*out.shape[:2], self.packed, out.shape[3], dtype=torch.float32)
            for band, places in zip(self.policy.bands(self), self.policy.places(self), strict=False):
                own = middle.new_empty(*middle.shape[:2], band.packed, middle.shape[3])
                band._decode(which, own, plain=False)
                if places is None:
                    middle = own
                else:
                    middle.scatter_(2, places[:, None, :, None].expand_as(own), own)
            middle = middle if guess is None else middle + guess
            out[:, :, front:end] = middle if which == "v" else self._plain(middle)
        out[:, :, end:] = exact[:, :, front:]
        return out

    def _decode(self, which: str, out: Tensor, plain: bool = True) -> None:
        """Rows of ``segments`` into ``out``; keys as they came, or (``plain=False``) as they are stored."""
        at = 0
        for segment in self.segments:
            if which == "k":
                x = self.coder_k().decode(segment.codes_k, segment.gain_k)
                x = self._plain(x) if plain else x
            else:
                x = self.coder_v().decode(segment.codes_v, segment.gain_v)
            out[:, :, at : at + len(segment)] = x
            at += len(segment)

    def _plain(self, k: Tensor) -> Tensor:
        return k if self.mean is None or self.scale is None else k * self.scale + self.mean

    # -- files

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file; :meth:`restore` reads them back."""
        self.settle()
        names = ("keys", "values", "mean", "scale", "basis", "_q2")
        tensors = {name: t for name in names if (t := getattr(self, name)) is not None}
        for kind, segments in (("segments", self.segments), ("fine", self.fine)):
            for i, segment in enumerate(segments):
                tensors |= {f"{kind}.{i}.{name}": t for name, t in vars(segment).items()}
        header = {
            "length": self.length, "segments": len(self.segments), "fine": len(self.fine), "exact_why": self.exact_why,
            "plan": vars(self.plan), "bits_v": list(self.bits_v),
        }  # fmt: skip
        if self.policy is not None:
            own, header["policy"] = self.policy.state()
            tensors |= {f"policy.{name}": tensor for name, tensor in own.items()}
        return tensors, header

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """What :meth:`state` gave, checked field by field; ValueError names what does not fit."""
        self.clear()
        if header["plan"] != vars(self.plan):
            raise TqaiError(f"the file was written with {header['plan']}, this cache is {vars(self.plan)}: give the same config")
        for name in ("keys", "values", "mean", "scale", "basis", "_q2"):
            setattr(self, name, tensors.get(name))
        self.bits_v = tuple(header["bits_v"])
        if (self.basis is None) != (len(self.bits_v) == 1):
            raise TqaiError("field 'basis' does not go with 'bits_v': save the cache again")
        if self.keys is None or self.values is None:
            if header["length"]:
                raise TqaiError("field 'keys' or 'values' is missing: save the cache again")
            return
        self.start(self.keys, self.values)
        self.keys, self.values = tensors["keys"], tensors["values"]
        for i in range(header["segments"]):
            self.segments.append(self._segment(tensors, f"segments.{i}", self.coder_k(), self.coder_v()))
        if self.policy is not None:
            for i in range(header["fine"]):
                self.fine.append(self._segment(tensors, f"fine.{i}", *self.policy.fine_coders(self)))
            own = {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")}
            self.policy.restore(own, header["policy"])
            self.policy.check(self)
        self.length, self.exact_why = header["length"], header["exact_why"]
        if self.packed + self.keys.shape[2] != self.length:
            raise TqaiError(f"field 'length' says {self.length}, the tensors hold {self.packed + self.keys.shape[2]}: save the cache again")

    def _segment(self, tensors: dict[str, Tensor], name: str, coder_k: Rows, coder_v: Rows | Split) -> Segment:
        """The segment of a file, checked field by field."""
        assert self.keys is not None
        parts = []
        for part, coder in (("codes_k", coder_k), ("gain_k", coder_k), ("codes_v", coder_v), ("gain_v", coder_v)):
            tensor = tensors.get(f"{name}.{part}")
            if tensor is None:
                raise TqaiError(f"field '{name}.{part}' is missing: save the cache again")
            wanted = (torch.uint8, coder.row_bytes) if part.startswith("codes") else (torch.bfloat16, None)
            if tensor.dtype != wanted[0] or tensor.shape[:2] != self.keys.shape[:2] or wanted[1] not in (None, tensor.shape[-1]):
                raise TqaiError(f"field '{name}.{part}' is {tensor.dtype} {tuple(tensor.shape)}: save the cache again")
            parts.append(tensor)
        return Segment(*parts)


def _first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :count].clone()  # a view would keep the rest alive


def _sizes(x: Tensor) -> list[int]:
    return list(x.shape)
