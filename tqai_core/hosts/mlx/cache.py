"""One layer of a packed prompt cache, and the hook that lets mlx-lm's attention read it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models import cache as caches

from ...codecs.rows import BITS
from ...errors import TqaiError
from ...kv.segments import AGAIN, Plan
from ...kv.statistics import KeyStatistics, sample
from ..language import Usage
from .rows import Rows, group_of

SCORES = 1 << 24  # numbers of a score matrix made at once

Pair = tuple[mx.array, mx.array]  # exact keys and values [B, H, n, D]


def _own(pair: Pair, start: int, end: int) -> Pair:
    """Tokens ``start`` to ``end`` in memory of their own: a slice would keep the rest alive."""
    k, v = (mx.take(x, mx.arange(start, end), axis=2) for x in pair)
    return k, v


def _joined(a: Pair, b: Pair) -> Pair:
    k, v = (mx.concatenate(both, 2) for both in zip(a, b, strict=True))
    return k, v


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    """Scores under a mask of their last columns, as many as the mask has."""
    free = scores.shape[-1] - mask.shape[-1]
    if free:
        whole = mx.ones if mask.dtype == mx.bool_ else mx.zeros
        mask = mx.concatenate([whole((*mask.shape[:-1], free), mask.dtype), mask], -1)
    return mx.where(mask, scores, mx.finfo(scores.dtype).min) if mask.dtype == mx.bool_ else scores + mask


@dataclass
class View:
    """What ``update_and_fetch`` hands to the attention in the place of keys or values. ``fresh``: the same tokens as the model
    gave them, where there are no others."""

    cache: PackedKVCache
    fresh: mx.array | None
    shape: tuple[int, ...]


class PackedKVCache(caches._BaseCache):
    """One layer of a prompt cache. ``bits`` and ``group_size`` make mlx-lm take its way for quantised caches, where our hook is.

    The exact rows before the packed ones are ``head``, those after them ``tail``; until something is packed, all are ``tail``.
    """

    group_size = 64

    def __init__(self, plan: Plan, interleaved: bool = False) -> None:
        """``interleaved``: whether rotary positions turn channels 2i and 2i + 1 together, not i and i + d/2."""
        self._begin(plan, interleaved)

    def _begin(self, plan: Plan, interleaved: bool) -> None:
        self.plan, self.bits, self.interleaved, self.hook = plan, plan.bits_k, interleaved, hook()
        self.usage, self.index = Usage(), 0  # one Usage for all layers of a prompt cache
        self.clear()

    def clear(self) -> None:
        self.head: Pair | None = None
        self.tail: Pair | None = None
        self.keys, self.values = Rows(self.plan.bits_k, self.plan.seed), Rows(self.plan.bits_v, self.plan.seed + 1)
        self.statistics = KeyStatistics()
        self.offset = self.peak = 0

    @property
    def packed(self) -> int:
        return self.keys.count

    @property
    def wants_queries(self) -> bool:
        return self.plan.calibrate > 0 and self.statistics.mean is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[View, View]:
        """New tokens ``keys [B, H, n, D], values [B, H, n, Dv]``, exact until :meth:`settle`."""
        self.usage.count(self.index)
        fresh, new = self.offset == 0, (keys, values)
        if self.tail is None:
            for x in new:
                group_of(x.shape[-1])
            self.tail = new
        else:
            for name, had, x in zip(("keys", "values"), self.tail, new, strict=True):
                if had.shape[:2] != x.shape[:2] or had.shape[3] != x.shape[3]:
                    raise TqaiError(
                        f"the cache holds {name} [batch, heads, tokens, dim] of {had.shape}, got {x.shape}: it belongs to another model "
                        "or batch; make a new one with make_prompt_cache(model)"
                    )
            self.settle()  # an attention that never came (a model that keeps its own) must not let the tail grow
            self.tail = _joined(self.tail, new)
        self.offset += keys.shape[2]
        k, v = (View(self, x if fresh else None, (*x.shape[:2], self.offset, x.shape[3])) for x in new)
        return k, v

    def observe(self, q: mx.array) -> None:
        """Queries ``[B, heads, n, D]`` that go with the keys, until the statistics are taken."""
        assert self.tail is not None
        if self.wants_queries and q.shape[-1] == self.tail[0].shape[-1]:
            self.statistics.observe(sample(q).astype(mx.float32), self.tail[0].shape[1])

    def settle(self) -> None:
        """Pack what has left the recent window, if the statistics are there and enough tokens are due."""
        if self.tail is None or self.offset < self.plan.calibrate:
            return
        sink, rest = 0 if self.packed else self.plan.sink, self.tail[0].shape[2]
        end = rest - self.plan.recent
        if end - sink < self.plan.flush:
            return
        if self.wants_queries:
            self.statistics.take(sample(self.tail[0][:, :, sink:]).astype(mx.float32), self.interleaved)
        if not self.packed:
            self.head = _own(self.tail, 0, sink)
        k, v = (x[:, :, sink:end].astype(mx.float32) for x in self.tail)
        dtype = mx.bfloat16 if self.tail[0].dtype == mx.bfloat16 else mx.float16
        self.peak = max(self.peak, self.nbytes)
        self.keys.add(self.statistics.stored(k), dtype)
        self.values.add(v, dtype)
        self.tail = _own(self.tail, end, rest)
        self.peak = max(self.peak, self.nbytes)

    # -- attention

    def attend(self, q: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
        """``q [B, heads, L, D]`` over all tokens -> ``[B, heads, L, Dv]``; a long prompt is read a block of queries at a time."""
        assert self.tail is not None
        b, heads, length, d = q.shape
        h = self.tail[0].shape[1]
        rows = max(SCORES // (b * heads * self.offset), 1)
        out = []
        for start in range(0, length, rows):
            end = min(start + rows, length)
            part: mx.array | None
            if isinstance(mask, str):  # causal: all that is packed lies before every query
                part = mx.arange(start, end)[:, None] >= mx.arange(length)[None]
            else:
                part = mask[..., start:end, :] if mask is not None and mask.shape[-2] > 1 else mask
            out.append(self._block(q[:, :, start:end].reshape(b, h, heads // h, end - start, d), scale, part))
        whole = out[0] if len(out) == 1 else mx.concatenate(out, axis=3)
        return whole.reshape(b, heads, length, -1).astype(q.dtype)

    def _block(self, q: mx.array, scale: float, mask: mx.array | None) -> mx.array:
        """``q [B, H, G, L, D]``; ``mask`` is of the last tokens, as many as it has columns. The parts are never joined: their scores
        would be copied."""
        dtype, q = q.dtype, q.astype(mx.float32) * scale
        mean, key_scale = self.statistics.mean, self.statistics.scale
        if mask is not None and mask.ndim > 3:  # [B, heads or 1, L, columns]
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(len(mask), *q.shape[1:3], *mask.shape[2:])
        parts, exact = [], [pair for pair in (self.head, self.tail) if pair is not None]
        for k, _ in exact:
            if mean is not None:  # softmax ignores q . mean if it is taken from every key
                k = (k.astype(mx.float32) - mean).astype(dtype)
            parts.append(q.astype(dtype) @ k[:, :, None].swapaxes(-1, -2))
        if self.packed:
            parts.insert(1, self.keys.scores(q if key_scale is None else q * key_scale[:, :, None], dtype))
        if mask is not None:
            at = mask.shape[-1] - sum(part.shape[-1] for part in parts)
            for i, part in enumerate(parts):
                start, at = at, at + part.shape[-1]
                if at > 0:
                    parts[i] = _masked(part, mask[..., max(start, 0) : at])
        top = reduce(mx.maximum, [part.max(-1, keepdims=True) for part in parts if part.shape[-1]])
        parts = [mx.exp(part.astype(mx.float32) - top) for part in parts]
        total = sum(part.sum(-1, keepdims=True) for part in parts)
        weights = [part.astype(dtype) for part in parts]
        sums = [(p @ v[:, :, None]).astype(mx.float32) for p, (_, v) in zip([weights[0], weights[-1]], exact, strict=False)]
        if self.packed:
            sums.insert(1, self.values.weighted(weights[1]))
        return (sum(sums) / total).astype(dtype)

    # -- what mlx-lm asks of a cache

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return caches.create_attention_mask(*args, offset=self.offset, **kwargs)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, as many as there are; the answer is how many."""
        self.settle()
        n = min(self.offset, n)
        if n == self.offset:
            self.clear()
            return n
        assert self.tail is not None
        self.offset -= n
        length = self.tail[0].shape[2]
        from_tail = min(n, length)
        from_rows = min(n - from_tail, self.packed)
        self.tail = _own(self.tail, 0, length - from_tail)
        for rows in (self.keys, self.values):
            rows.count -= from_rows
        if self.head is not None and not self.packed:  # only sinks are left: they are the tail now
            self.tail = _joined(_own(self.head, 0, self.head[0].shape[2] - (n - from_tail - from_rows)), self.tail)
            self.head, self.keys.parts, self.values.parts = None, [], []
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of every array that is kept, room to grow and statistics included."""
        return sum(x.nbytes for _, x in tree_flatten([self.arrays(), self.keys.parts, self.values.parts]) if isinstance(x, mx.array))

    def arrays(self) -> list[mx.array | None]:
        """Everything but packed rows: exact rows and statistics."""
        known = self.statistics
        return [*(self.head or (None, None)), *(self.tail or (None, None)), known.mean, known.scale, known.query_energy]

    @property
    def state(self) -> list[Any]:
        """Arrays and numbers as ``mlx_lm.models.cache.save_prompt_cache`` wants them."""
        p = self.plan
        numbers = [self.offset, self.packed, p.bits_k, p.bits_v, p.sink, p.recent, p.calibrate, p.seed, int(self.interleaved)]
        return [self.arrays(), self.keys.read() or [None] * 3, self.values.read() or [None] * 3, numbers]

    @state.setter
    def state(self, given: Sequence[Any]) -> None:
        try:
            (head_k, head_v, tail_k, tail_v, mean, scale, energy), keys, values, numbers = given
            offset, count, *plan, interleaved = (int(n) for n in numbers)
            self._begin(Plan(*plan), bool(interleaved))  # mlx-lm makes the object without __init__
        except (TypeError, ValueError) as error:
            raise TqaiError(f"this is no state of a packed cache ({str(error)[:200]}): {AGAIN}") from None
        if min(offset, count, *plan) < 0 or max(offset, count, *plan) >= 2**31 or not {*plan[:2]} <= {*BITS}:
            raise TqaiError(f"the state has numbers out of range ({offset}, {count}, {plan}): {AGAIN}")
        self.head = None if head_k is None else (head_k, head_v)
        self.tail = None if tail_k is None else (tail_k, tail_v)
        self.statistics = KeyStatistics(mean, scale, energy)
        if self.tail is not None:
            check_state(self.head, self.tail, (mean, scale, energy), [(self.plan.bits_k, keys), (self.plan.bits_v, values)], count)
        for rows, parts in ((self.keys, keys), (self.values, values)):
            rows.parts, rows.count = [part for part in parts if part is not None], count
        self.offset = offset
        exact = sum(pair[0].shape[2] for pair in (self.head, self.tail) if pair is not None)
        if exact + count != offset or any(len(rows.parts) != 3 * bool(count) for rows in (self.keys, self.values)):
            raise TqaiError(f"the state says {offset} tokens, its arrays hold {exact} + {count}: {AGAIN}")


def check_state(head: Pair | None, tail: Pair, statistics: Sequence[Any], rows: Sequence[tuple[int, Sequence[Any]]], count: int) -> None:
    """TqaiError unless the arrays of a file have the shapes of one cache ``[B, H, tokens, D]``, and finite numbers."""
    known = {"tail": tail, "head": head or (), "statistics": [x for x in statistics if x is not None]}
    for bits, parts in rows:
        known[f"rows of {bits} bits"] = [x for x in parts if x is not None]
    for name, arrays in known.items():
        for x in arrays:
            whole = name.startswith("rows") and x is arrays[0]
            if not isinstance(x, mx.array) or x.ndim != 4 or mx.issubdtype(x.dtype, mx.floating) == whole:
                raise TqaiError(f"an array of {name} is {getattr(x, 'dtype', None)} {getattr(x, 'shape', None)}: {AGAIN}")
            if not whole and not bool(mx.isfinite(x).all().item()):
                raise TqaiError(f"{name} has NaN or inf, the file is damaged: {AGAIN}")
    batch, sizes = tail[0].shape[:2], [x.shape[3] for x in tail]
    fits = all(k.shape[:3] == v.shape[:3] and [k.shape[3], v.shape[3]] == sizes for k, v in filter(None, (head, tail)))
    fits = (
        fits and all(x.shape == (*batch, 1, sizes[0]) for x in known["statistics"]) and (statistics[0] is None) == (statistics[1] is None)
    )
    for d, (bits, parts) in zip(sizes, rows, strict=True):
        wide = [d * bits // 32, d // group_of(d), d // group_of(d)]
        fits = fits and all(x is None or x.shape == (*batch, count, n) for x, n in zip(parts, wide, strict=True))
    if not fits or any(x.shape[:2] != batch for arrays in known.values() for x in arrays):
        raise TqaiError(f"the arrays of the state do not belong together: {AGAIN}")


class Hook:
    """Stands in for mlx-lm's attention on quantised caches while a packed cache or a handle lives; other caches pass unchanged."""

    def __init__(self) -> None:
        before = base.quantized_scaled_dot_product_attention

        def attention(q: mx.array, keys: Any, values: Any, scale: float, mask: Any, **options: Any) -> mx.array:
            if not isinstance(keys, View):
                return before(q, keys, values, scale=scale, mask=mask, **options)
            keys.cache.observe(q)
            if keys.fresh is not None and values.fresh is not None:
                out = mx.fast.scaled_dot_product_attention(q, keys.fresh, values.fresh, scale=scale, mask=mask)
            else:
                out = keys.cache.attend(q, scale, mask)
            keys.cache.settle()
            return out

        def undo() -> None:
            if base.quantized_scaled_dot_product_attention is attention:  # else someone else has put theirs on top, which calls ours
                base.quantized_scaled_dot_product_attention = before

        base.quantized_scaled_dot_product_attention = attention
        self.remove = weakref.finalize(self, undo)

    def __deepcopy__(self, memo: Any) -> Hook:
        return self  # mlx-lm's server copies prompt caches


_HOOKS: weakref.WeakValueDictionary[str, Hook] = weakref.WeakValueDictionary()


def hook() -> Hook:
    """The one hook; it goes when nothing holds it any more."""
    return _HOOKS.get("hook") or _HOOKS.setdefault("hook", Hook())
