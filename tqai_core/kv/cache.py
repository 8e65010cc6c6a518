"""Keys and values of one attention layer, packed as they arrive: torch alone, no model library.

Positions, in order: the first ``sink`` tokens and the last ``recent`` ones are exact, in the model's dtype; between them
lie segments of packed rows (:mod:`codecs.rows`). A token is packed once, when the recent window has passed it, and never
again.

Keys are stored as (k - mean) / scale, per sequence, head and channel (:mod:`kv.statistics`): softmax ignores what is added
to all scores of a query, and q.k is unchanged when q takes the scale. This takes away outlier channels and key biases, which
make plain quantisers fail (Qwen2 at 4 bits). The statistics need 256 tokens: with 64 they cost more than they gain. Until
then everything is held exact. Values get axes of their own where that pays (:mod:`codecs.split`).

Padding in front of a sequence counts for nothing: its positions, those that no query sees, go behind the sinks when the first
tokens are packed, so that sinks are real tokens; statistics and the wait for them take real tokens alone.

A policy (:mod:`kv.policy`) decides which tokens get finer rows, which then lie in segments of their own, what of the keys is
predicted, and what a step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..codecs import split
from ..codecs.rows import BITS, Rows, rows
from ..codecs.split import UNIT, Split
from ..errors import TqaiError
from ..files import check_tensor
from ..types import nbytes
from .calibrated import Shape
from .policy import Policy, order
from .segments import AGAIN, FLOATS, SEGMENT, BitTier, PackBatch, Plan, Segment, cut, encode, extend, rows_in
from .statistics import SAMPLE, KeyStatistics, sample

STATISTICS = ("mean", "scale", "_q2")
LEAST = (("scale", 1e-12), ("_q2", -1e-30))  # energies may be 0
LARGEST = 1e12  # of all numbers in a file: no model has such keys, and products of two stay within fp32


class PackedKV:
    """The cache of one layer. ``append`` new tokens, attend (see :mod:`attention.packed`), then ``settle``.

    ``settle`` packs what has left the recent window. Everything that changes tokens settles first, so that the state does
    not depend on who asks when. ``observe`` gives it queries until the statistics are taken.
    """

    def __init__(self, plan: Plan, policy: Policy | None = None, shapes: tuple[Shape | None, Shape | None] = (None, None)) -> None:
        self.plan, self.policy = plan, policy or Policy(plan)
        self.shape_k, self.shape_v = shapes  # of a calibration file; they belong to the model, and are not counted as the cache's
        self.policy.shape = self.shape_k
        self._enough = plan.sink + plan.recent + plan.flush  # exact rows below which none is due
        self.clear()

    def clear(self) -> None:
        """Empty, ready for other sequences."""
        self.segments: list[Segment] = []
        self.fine: list[Segment] = []  # rows of more bits, where the policy gives some tokens those
        self.keys: Tensor | None = None  # exact rows [B, H, sinks + recent, D]
        self.values: Tensor | None = None
        self.length = 0
        self.statistics = KeyStatistics()
        self.basis: Tensor | None = None  # axes of the values int8 [H, r, D], of all sequences alike
        self.bits_v: tuple[int, ...] = (self.plan.bits_v,)  # of the parts of a row
        self._coder_v: Split | None = None
        self.exact_why: str | None = None  # set when this layer can no longer pack
        self.decoded = 0  # times dense values were made
        self.pads: Tensor | None = None  # int64 [B]: leading positions of each sequence that are padding; None: of none
        self.most_pads = 0  # at least the largest of them
        self.prepared: Any = None  # the packed rows as a kernel reads them; forgotten when they change
        self.moved = False  # whether the rows of the pads lie behind the sinks
        self.policy.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "prepared": None}  # pointers mean nothing to a copy

    # -- sizes

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Exact rows of keys and values; the cache must have been started."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def sinks(self) -> int:
        """Exact rows before the packed ones."""
        return self.plan.sink if self.packed else self.length

    @property
    def packed(self) -> int:
        """Packed tokens."""
        return rows_in(self.segments) + rows_in(self.fine)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, statistics included."""
        segments = [vars(segment) for segment in (*self.segments, *self.fine)]
        return nbytes([segments, self.keys, self.values, self.basis, self.statistics, self.pads, self.policy.tensors, self.policy.states])

    def coders(self, fine: bool = False) -> tuple[Rows, Rows | Split]:
        """Coders of keys and values of a tier; fine rows are plain, they have bits enough."""
        (k, v), seed = self.exact, self.plan.seed
        bits_k, bits_v = self.policy.fine if fine else (self.plan.bits_k, self.plan.bits_v)
        coder_k, coder_v = rows(k.shape[-1], bits_k, seed, k.device), rows(v.shape[-1], bits_v, seed + 1, v.device)
        coder_k = coder_k if self.shape_k is None else self.shape_k.coder(coder_k, seed)
        if self.shape_v is not None:
            return coder_k, self.shape_v.coder(coder_v, seed + 1)
        if fine or self.basis is None:
            return coder_k, coder_v
        if self._coder_v is None or self._coder_v.basis is not self.basis:
            self._coder_v = Split(v.shape[-1], (self.bits_v[0], self.bits_v[-1]), self.basis, seed + 1)
        return coder_k, self._coder_v

    # -- tokens in and out

    def start(self, k: Tensor, v: Tensor) -> None:
        """Fix batch, heads, dimensions, dtype and device by ``k, v [B, H, n, D]``. Raises TqaiError for sizes it cannot pack."""
        rows(k.shape[-1], self.plan.bits_k, self.plan.seed, k.device)
        rows(v.shape[-1], self.plan.bits_v, self.plan.seed + 1, v.device)
        self.keys, self.values = k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3])

    def append(self, k: Tensor, v: Tensor) -> None:
        """New tokens ``k [B, H, n, D], v [B, H, n, Dv]`` at the end, exact for now."""
        if self.keys is None:
            self.start(k, v)
        for name, had, new in zip(("keys", "values"), self.exact, (k, v), strict=True):
            if had.shape[:2] != new.shape[:2] or had.shape[3] != new.shape[3]:
                raise TqaiError(
                    f"the cache holds {name} [batch, heads, tokens, dim] of {list(had.shape)}, got {list(new.shape)}: it belongs to "
                    "another model or batch; call cache.reset() or make a new one"
                )
        self.settle()
        k, v = (x.detach() if x.requires_grad else x for x in (k, v))
        grown = lambda had, new: torch.cat((had, new), 2) if had.shape[2] else new.detach()  # noqa: E731
        self.keys = grown(self.keys, k)  # one after the other: the peak is one tensor above what is held
        self.values = grown(self.values, v)
        self.length += k.shape[2]

    @property
    def wants_statistics(self) -> bool:
        """Whether statistics are still to be taken."""
        return self.plan.calibrate > 0 and self.statistics.mean is None and self.exact_why is None

    @property
    def wants_queries(self) -> bool:
        """Whether queries are asked for: by the statistics, or by a method at all times."""
        return self.wants_statistics or (self.exact_why is None and self.policy.recent_queries > 0)

    def observe(self, q: Tensor) -> None:
        """Queries ``[B, heads, n, D]`` that go with the keys; ignored once nobody asks for them."""
        if self.statistics.mean is not None and not self.policy.recent_queries:  # as it nearly always is
            return
        if not self.wants_queries or self.keys is None or q.shape[-1] != self.keys.shape[-1]:
            return
        self.policy.observe(q)
        if self.wants_statistics:
            self.statistics.observe(self._sample_queries(q.detach()).float(), self.keys.shape[1])

    def see(self, mask: Tensor | None, count: int) -> None:
        """The mask ``[B or 1, heads or 1, count or 1, tokens]``, bool or added, of the last ``count`` tokens. Leading tokens that no
        query sees are padding. It is looked at until every sequence has a token, which is at the prompt: one wait for the device."""
        before = self.length - count
        if self.keys is None or mask is None or self.most_pads < before or mask.ndim != 4 or mask.shape[-1] != self.length:
            return
        own = mask[..., before:]
        hidden = ~(own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).flatten(1, 2).any(1)
        found = hidden.long().cumprod(1).sum(1).expand(self.keys.shape[0])
        pads = found.clone() if self.pads is None else torch.where(self.pads == before, before + found, self.pads)
        self._set_pads(pads if before == 0 or self.pads is not None else None)

    def _set_pads(self, pads: Tensor | None) -> None:
        self.most_pads = 0 if pads is None else int(pads.max())
        self.pads = self.policy.pads = pads if self.most_pads else None

    def _places(self) -> Tensor:
        """The positions that the first rows hold where pads were moved, ``int64 [B, sinks + pads]``; later rows hold their own."""
        assert self.pads is not None
        sink, pads = self.plan.sink, self.pads[:, None]
        row = torch.arange(sink + self.most_pads, device=pads.device)[None]
        return torch.where(row < sink, pads + row, torch.where(row < sink + pads, row - sink, row))

    def in_rows(self, mask: Tensor | None) -> Tensor | None:
        """A mask over the positions as one over the rows."""
        if mask is None or not self.moved:
            return mask
        place = self._places()[:, None, None]
        mask = mask.expand(len(place), -1, -1, -1)
        front = mask.gather(3, place.expand(-1, *mask.shape[1:3], -1))
        return torch.cat([front, mask[..., place.shape[-1] :]], 3)

    def _move_pads(self) -> None:
        """Pads go behind the sinks, in the exact rows, before the first of them is packed."""
        place, self.moved = self._places()[:, None, :, None], True
        n = place.shape[2]
        self.keys, self.values = (
            torch.cat([x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])), x[:, :, n:]], 2) for x in self.exact
        )

    def _sample(self, x: Tensor) -> Tensor:
        """Some of the exact rows ``x`` behind the sinks, evenly spread, no padding among them; nothing is packed yet."""
        start = min(self.plan.sink, self.length - 1)
        if self.pads is None:
            return sample(x[:, :, start:]).float()
        first, count = start + self.pads[:, None], min(self.length - start - self.most_pads, SAMPLE)
        place = first + torch.arange(count, device=x.device) * (self.length - first) // count
        return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])).float()

    def _sample_queries(self, q: Tensor) -> Tensor:
        """Some of the queries ``q`` of the last tokens, those of padding 0 or left out."""
        first, n = self.length - q.shape[2], q.shape[2]
        if self.pads is None or first >= self.most_pads:
            return sample(q)
        start, count = (self.pads[:, None] - first).clamp_min(0), min(self.length - self.most_pads, SAMPLE)
        if count <= 0:  # a sequence has none
            return sample(q.masked_fill((torch.arange(n, device=q.device) < start)[:, None, :, None], 0))
        place = start + torch.arange(count, device=q.device) * (n - start) // count
        return q.gather(2, place[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def settle(self) -> None:
        """Pack what has left the recent window, if the statistics are there and enough tokens are due."""
        plan = self.plan
        if self.keys is None or self.keys.shape[2] < self._enough or self.exact_why or self.values is None:
            return
        if self.length - self.most_pads < max(plan.calibrate, plan.sink + 1 if self.most_pads else 0):
            return
        due = self.policy.due(self.keys.shape[2] - plan.sink - plan.recent, self.packed)
        if due < plan.flush:
            return
        self.prepared = None
        if self.most_pads and not self.moved:
            self._move_pads()
        if self.wants_statistics:
            found = split.plan(self._sample(self.exact[1]), plan.bits_v, self.length) if self.shape_v is None else None
            if found is not None:
                self.bits_v, self.basis = found
            if self.shape_k is not None:
                self.statistics.query_energy = None  # centred alone: the matrices scale
            self.statistics.take(self._sample(self.exact[0]))
        done = 0
        while done < due:
            size = self.policy.size(due - done, self.packed)
            if not self._pack(plan.sink + done, size):
                self.exact_why = f"keys or values of tokens {plan.sink + self.packed} and on hold NaN or inf"
                break
            done += size
        if done:  # exact rows that were packed go
            self.keys, self.values = (torch.cat([x[:, :, : plan.sink], x[:, :, plan.sink + done :]], 2) for x in self.exact)
        if not self.packed:
            self.statistics, self.basis, self.bits_v = KeyStatistics(), None, (plan.bits_v,)

    def _pack(self, at: int, size: int) -> bool:
        """Pack the exact rows ``at`` to ``at + size``, or False where they are not finite."""
        (keys, values), stored = self.exact, self.statistics.stored
        k, v = stored(keys[:, :, at : at + size].float()), values[:, :, at : at + size].float()
        q = self.policy.queries(keys.shape[1], self.statistics.scale)
        exact_rows = lambda: (stored(keys.float()), values.float(), at)  # noqa: E731
        batch = PackBatch(k, v, q, self.plan.sink + self.packed, exact_rows, self.coders())
        if self.pads is not None and self.packed < self.most_pads:
            row = torch.arange(keys.shape[2], device=keys.device) - at
            real = (row + at < self.plan.sink) | (row + self.packed >= self.pads[:, None])  # of the exact rows
            batch.real, own = real, real[:, None, at : at + size, None]
            batch.k, batch.v = k.where(own, 0), v.where(own, 0)
        if not self.policy.decide(batch):
            return False
        count = 0 if batch.fine is None else int(batch.fine[0].sum())
        made: list[tuple[list[Segment], Segment]] = []
        for held, fine, numbers in ((self.segments, False, size - count), (self.fine, True, count)):
            k, v = batch.rest, batch.v
            if batch.fine is not None and 0 < numbers < size:
                place = order(batch.fine if fine else ~batch.fine)[:, None, :numbers, None]
                k, v = (x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
            if numbers:
                segment, all_finite = encode(k, v, *self.coders(fine))
                if not all_finite:
                    return False
                made.append((held, segment))
        self.policy.keep(batch, self.packed)
        for held, segment in made:
            extend(held, segment)
        return True

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens. TqaiError for more than there are."""
        if not 0 <= count <= self.length:
            raise TqaiError(f"cannot crop {count} tokens: the cache keeps {self.length}; crop at most that many, or reset() it")
        self.settle()
        if count == 0 or self.keys is None:
            return
        if self.moved and self.length - count < self.plan.sink + self.most_pads:
            self._move_pads_back()
        recent = self.keys.shape[2] - (self.plan.sink if self.packed else 0)
        gone = min(max(count - recent, 0), self.packed)  # packed tokens; the others are exact ones, behind and before them
        self.length -= count
        if own := count - gone:  # a view would keep the rest alive
            self.keys, self.values = (x[:, :, : x.shape[2] - own].clone() for x in self.exact)
        if gone:
            self._crop_packed(self.packed - gone)
        if self.length == 0:
            k, v = self.exact
            self.clear()
            self.keys, self.values = k, v
        elif self.pads is not None and self.length < self.most_pads:
            self._set_pads(self.pads.clamp(max=self.length))

    def _move_pads_back(self) -> None:
        """All rows exact again, as far as they still are, in the order of the positions."""
        keys, values = self.dense("k"), self.dense("v")
        (length, pads, why), decoded = (self.length, self.pads, self.exact_why), self.decoded
        self.clear()
        self.keys, self.values, self.length, self.exact_why, self.decoded = keys, values, length, why, decoded
        self._set_pads(pads)

    def _crop_packed(self, left: int) -> None:
        """Keep ``left`` packed tokens. Where the policy can cut only before that, the tokens between become exact rows again,
        decoded."""
        self.prepared = None
        whole, front = self.policy.boundary(left), self.plan.sink
        between = [self._dense_rows(which)[:, :, front + whole : front + left] for which in "kv"] if whole < left else []
        fine = self.policy.crop(whole)
        cut(self.segments, whole - fine)
        cut(self.fine, fine)
        if between:
            self.keys, self.values = (torch.cat(pair, 2) for pair in zip(self.exact, between, strict=True))

    def move(self, device: torch.device | str) -> None:
        """Everything to another device, without waiting for it."""
        self.map_batch(lambda x: x.to(device, non_blocking=True))
        self.basis = None if self.basis is None else self.basis.to(device, non_blocking=True)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select sequences: ``change`` is applied to every tensor whose first dimension is the batch."""
        self.settle()
        self.prepared = None
        for segment in (*self.segments, *self.fine):
            segment.map(change)
        self.policy.map_batch(change)
        if self.pads is not None:
            self.pads = self.policy.pads = change(self.pads)
        self.keys, self.values = (None if x is None else change(x) for x in (self.keys, self.values))
        self.statistics = KeyStatistics(*(None if x is None else change(x) for x in vars(self.statistics).values()))

    # -- reading

    def tiers(self, ordered: bool = False) -> list[BitTier]:
        """The cache as attention reads it. ``ordered``: whether it matters which row is whose."""
        (keys, values), s, fine = self.exact, self.statistics, rows_in(self.fine)
        places = self.policy.places(fine) if fine and (ordered or self.policy.by_block) else (None, None)
        base = BitTier(keys, values, self.segments, *self.coders(), s.mean, s.scale, self.sinks, rows_in(self.segments), places[0])
        if not fine:
            return [base]
        keys, values = keys[:, :, :0], values[:, :, :0]
        return [base, BitTier(keys, values, self.fine, *self.coders(fine=True), s.mean, s.scale, 0, fine, places[1])]

    def dense(self, which: str) -> Tensor:
        """All keys (``"k"``) or values (``"v"``) ``[B, H, tokens, D]`` in the model's dtype, decoded."""
        out = self._dense_rows(which)
        if not self.moved:
            return out
        place = self._places()[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
        return out.scatter(2, place, out[:, :, : place.shape[2]])

    def _dense_rows(self, which: str) -> Tensor:
        """The same in the order of the rows."""
        exact, packed, front = self.exact[which == "v"], self.packed, self.plan.sink
        if not packed:
            return exact
        self.decoded += 1
        out = exact.new_empty(*exact.shape[:2], exact.shape[2] + packed, exact.shape[3])
        out[:, :, :front], out[:, :, front + packed :] = exact[:, :, :front], exact[:, :, front:]
        middle, guess = out[:, :, front : front + packed], self.policy.predicted(exact) if which == "k" else None
        for tier in self.tiers(ordered=True):
            at = 0
            for segment in tier.segments:
                end = at + len(segment)
                if which == "k":
                    x = tier.coder_k.decode(segment.codes_k, segment.gain_k)
                else:
                    x = tier.coder_v.decode(segment.codes_v, segment.gain_v)
                place = None if tier.order is None else tier.order[:, None, at:end, None].expand_as(x)
                if guess is not None:
                    x = x + (guess[:, :, at:end] if place is None else guess.gather(2, place))
                x = (self.statistics.restored(x) if which == "k" else x).to(out.dtype)
                if place is None:
                    middle[:, :, at:end] = x
                else:
                    middle.scatter_(2, place, x)
                at = end
        return out

    # -- files; the names of fields are those of FORMAT 1

    @property
    def shapes(self) -> list[str]:
        """Names of the calibrated matrices of keys and values, "" where there are none."""
        return ["" if shape is None else shape.name for shape in (self.shape_k, self.shape_v)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file; :meth:`restore` reads them back."""
        self.settle()
        s = self.statistics
        named = {"keys": self.keys, "values": self.values, "mean": s.mean, "scale": s.scale, "basis": self.basis, "_q2": s.query_energy}
        named["pads"] = self.pads  # of padded batches alone, as "moved" is
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        for kind, segments in (("segments", self.segments), ("fine", self.fine)):
            for i, segment in enumerate(segments):
                tensors |= {f"{kind}.{i}.{name}": tensor for name, tensor in vars(segment).items()}
        own, policy = self.policy.state()
        header = {
            "length": self.length, "segments": len(self.segments), "fine": len(self.fine), "exact_why": self.exact_why,
            "plan": vars(self.plan), "bits_v": list(self.bits_v),
        } | ({"moved": True} if self.moved else {}) | ({"shapes": self.shapes} if any(self.shapes) else {})  # fmt: skip
        return tensors | {f"policy.{name}": tensor for name, tensor in own.items()}, header | ({"policy": policy} if policy else {})

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """What :meth:`state` gave, checked field by field; TqaiError names what does not fit."""
        self.clear()
        if header.get("plan") != vars(self.plan):
            raise TqaiError(f"the file was written with {header.get('plan')}, this cache is {vars(self.plan)}: give the same config")
        if header.get("shapes", ["", ""]) != self.shapes:
            raise TqaiError("the file was written with another calibration file: give the one that it was written with")
        if header["length"] == 0 and not {"keys", "values"} & tensors.keys():
            return
        keys = check_tensor(tensors, "keys", (None,) * 4, FLOATS, AGAIN)
        values = check_tensor(tensors, "values", (*keys.shape[:3], None), (keys.dtype,), AGAIN)
        exact = ("keys", "values") if header.get("exact_why") else ()  # a layer may be held exact because of NaN or inf
        check_range({name: tensor for name, tensor in tensors.items() if name not in exact})
        self.start(keys, values)
        self.keys, self.values = keys, values
        _side(self, tensors, tuple(header["bits_v"]))
        for kind, segments in (("segments", self.segments), ("fine", self.fine)):
            for i in range(header[kind]):
                segments.append(_segment(tensors, f"{kind}.{i}", self.keys.shape[:2], *self.coders(kind == "fine")))
        if self.packed and (keys.shape[2] < self.plan.sink or (self.statistics.mean is None) != (self.plan.calibrate == 0)):
            raise TqaiError(f"field 'mean' or the first {self.plan.sink} keys are missing, with {self.packed} tokens packed: {AGAIN}")
        own = {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")}
        self.policy.restore(own, header.get("policy") or {}, keys, self.packed, self.packed - sum(map(len, self.segments)))
        self.length, self.exact_why, self.moved = header["length"], header["exact_why"], bool(header.get("moved"))
        self._restore_pads(tensors.get("pads"))
        if self.packed + keys.shape[2] != self.length:
            raise TqaiError(f"field 'length' says {self.length}, the tensors hold {self.packed + keys.shape[2]}: {AGAIN}")

    def _restore_pads(self, pads: Tensor | None) -> None:
        """The padding of a file, checked; files of caches without padding have none."""
        wrong = self.moved if pads is None else pads.dtype != torch.int64 or pads.shape != self.exact[0].shape[:1]
        if wrong or (pads is not None and not 0 <= int(pads.min()) <= int(pads.max()) <= self.length):
            raise TqaiError(f"field 'pads' is missing or counts what is not there: {AGAIN}")
        self._set_pads(pads)
        if self.moved and self.length < self.plan.sink + self.most_pads:
            raise TqaiError(f"field 'pads' says {self.most_pads} of {self.length} tokens: {AGAIN}")


def check_range(tensors: Mapping[str, Tensor]) -> None:
    """TqaiError names a tensor with NaN, inf, or numbers from which attention overflows."""
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel() and not bool((x.abs() < LARGEST).all()):
            raise TqaiError(f"field {name!r} is damaged, it has NaN, inf or numbers beyond {LARGEST:g}: {AGAIN}")


def _side(kv: PackedKV, tensors: dict[str, Tensor], bits_v: tuple[int, ...]) -> None:
    """Statistics of the keys and axes of the values."""
    (keys, values), again = kv.exact, AGAIN
    b, h, d = keys.shape[0], keys.shape[1], keys.shape[3]
    known = {name: check_tensor(tensors, name, (b, h, 1, d), (torch.float32,), again) for name in STATISTICS if name in tensors}
    if ("mean" in known) != ("scale" in known) or any(not bool((known[name] > low).all()) for name, low in LEAST if name in known):
        raise TqaiError(f"field 'mean', 'scale' or '_q2' is missing or damaged: {again}")
    kv.statistics = KeyStatistics(*(known.get(name) for name in STATISTICS))
    if ("basis" in tensors) != (len(bits_v) == 2) or (len(bits_v) == 1 and bits_v != (kv.plan.bits_v,)):
        raise TqaiError(f"field 'basis' does not go with 'bits_v': {again}")
    if "basis" in tensors:
        basis = check_tensor(tensors, "basis", (h, None, values.shape[3]), (torch.int8,), again)
        r = basis.shape[1]
        if r % UNIT or not 0 < r <= values.shape[3] // 2 or not set(bits_v) <= set(BITS) or not bool(basis.any(-1).all()):
            raise TqaiError(f"field 'basis' {list(basis.shape)} of {list(bits_v)} bits is damaged: {again}")
        kv.basis, kv.bits_v = basis, bits_v


def _segment(tensors: dict[str, Tensor], name: str, shape: torch.Size, coder_k: Rows, coder_v: Rows | Split) -> Segment:
    """The segment of a file, checked field by field."""
    parts: list[Tensor] = []
    for part, coder in (("k", coder_k), ("v", coder_v)):
        size = parts[0].shape[2] if parts else None
        codes = check_tensor(tensors, f"{name}.codes_{part}", (*shape, size, coder.row_bytes), (torch.uint8,), AGAIN)
        runs = (2,) if isinstance(coder, Split) else ()
        gain = check_tensor(tensors, f"{name}.gain_{part}", (*shape, codes.shape[2], *runs), (torch.bfloat16,), AGAIN)
        if not 0 < codes.shape[2] <= SEGMENT:
            raise TqaiError(f"field '{name}.codes_{part}' is of {codes.shape[2]} tokens, a segment has {SEGMENT} at most: {AGAIN}")
        parts += [codes, gain]
    return Segment(*parts)
