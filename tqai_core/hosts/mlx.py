"""mlx-lm: a prompt cache of packed keys and values, read by mlx's own quantised kernels.

>>> from tqai_core.hosts.mlx import make_prompt_cache             # doctest: +SKIP
>>> cache = make_prompt_cache(model, tqai.Config(level="kv"))        # doctest: +SKIP
>>> mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)    # doctest: +SKIP

As in :mod:`tqai_core.kv`: sinks and a recent window exact, keys as (k - mean) / scale once 256 tokens are there, each token
packed once. mlx's kernels read uniform levels with a scale and an offset for each group of 64, so rows are rotated (values
too) and both are fitted by least squares to what is coded, from a range that suits Gaussians: NMSE .107 / .0073 at 2 / 4
bits, where mlx's own smallest-to-largest has .155 / .0082. What is exact at any time is the chunk being read, the window, and
at first the tokens that the statistics wait for; never the whole prompt.
"""

from __future__ import annotations

import json
import sys
import time
import weakref
from collections.abc import Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models import cache as caches

from ..codecs import rotation
from ..config import Config
from ..errors import TqaiError
from ..handle import Handle
from ..kv.cache import FLUSH, SAMPLE, Plan
from ..kv.layers import chosen, strong_layers
from ..registry import build
from ..report import Report

STEP = 256  # rows a buffer grows by, as mlx-lm's own caches do
SCORES = 1 << 24  # numbers of a score matrix made at once
RANGE = {2: 0.62, 3: 0.85}  # of largest - smallest of 64 Gaussians: where uniform levels err least; 4 bits and more: all of it
FITS = 2  # rounds of least squares


# -- rows: rotated, uniform levels, mlx's packed form


def group_of(d: int) -> int:
    """Coordinates that share a scale and an offset. ValueError for what mlx's kernels do not read."""
    if d % 32:
        raise TqaiError(f"head dimension {d} cannot be packed for mlx: its quantised kernels want a multiple of 32; use mlx-lm's own cache")
    return 64 if d % 64 == 0 else 32


@lru_cache(maxsize=32)
def _turn(d: int, seed: int) -> mx.array:
    """The core's random rotation, ``fp32 [d, d]``: ``rotated = x @ turn.T``."""
    block = rotation.block_size(d)
    m = rotation.matrix(block, seed).numpy()
    return mx.array(m if block == d else np.kron(np.eye(d // block, dtype=np.float32), m))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes ``uint32 [..., d]`` as a stream of bits in words, lowest first: what ``mx.dequantize`` reads."""
    if 32 % bits == 0:
        parts = codes.reshape(*codes.shape[:-1], -1, 32 // bits) << (mx.arange(32 // bits, dtype=mx.uint32) * bits)
    else:
        ones = (codes[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
        parts = ones.reshape(*codes.shape[:-1], -1, 32) << mx.arange(32, dtype=mx.uint32)
    return parts.sum(-1).astype(mx.uint32)


def encode(x: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Rotated rows ``fp32 [..., d]`` -> words ``uint32 [..., d * bits / 32]``, scales and offsets ``[..., groups]`` of ``dtype``."""
    most = 2**bits - 1
    x = x.reshape(*x.shape[:-1], -1, group_of(x.shape[-1]))
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = (high - low) * (RANGE.get(bits, 1.0) / most)
    offset = (low + high - most * step) / 2
    level = lambda step, offset: mx.clip(mx.round((x - offset) / mx.where(step > 0, step, 1.0)), 0, most)  # noqa: E731
    mean = x.mean(-1, keepdims=True)
    for _ in range(FITS):
        codes = level(step, offset)
        middle = codes.mean(-1, keepdims=True)
        spread = (codes - middle).square().mean(-1, keepdims=True)
        fit = ((codes - middle) * (x - mean)).mean(-1, keepdims=True) / mx.maximum(spread, 1e-12)
        step = mx.where(spread > 0, fit, step)
        offset = mean - step * middle
    step, offset = step.astype(dtype), offset.astype(dtype)
    codes = level(step.astype(mx.float32), offset.astype(mx.float32))
    return pack(codes.astype(mx.uint32).flatten(-2), bits), step.squeeze(-1), offset.squeeze(-1)


class Rows:
    """Packed rows of consecutive tokens, ``[B, H, capacity, ...]``; ``count`` of them are there."""

    def __init__(self, bits: int) -> None:
        self.bits, self.count = bits, 0
        self.parts: list[mx.array] = []

    def add(self, x: mx.array, dtype: mx.Dtype) -> None:
        """Append rotated rows ``fp32 [B, H, n, d]``."""
        new = encode(x, self.bits, dtype)
        end = self.count + x.shape[2]
        if not self.parts or self.parts[0].shape[2] < end:
            room = -(-end // STEP) * STEP
            for i, part in enumerate(new):  # one tensor at a time: the peak is one of them above what is held
                grown = mx.zeros((*part.shape[:2], room, part.shape[3]), part.dtype)
                if self.count:
                    grown[:, :, : self.count] = self.parts[i][:, :, : self.count]
                self.parts[i : i + 1] = [grown]
        for i, part in enumerate(new):
            self.parts[i][:, :, self.count : end] = part
        self.count = end

    @property
    def sound(self) -> bool:
        """Whether no NaN or inf was packed. Waits for the device: for reports."""
        return not self.count or all(bool(mx.isfinite(part).all().item()) for part in self.read()[1:])

    def read(self) -> list[mx.array]:
        return [part[:, :, : self.count] for part in self.parts]

    def matmul(self, x: mx.array, transpose: bool, group: int) -> mx.array:
        """``x [B, H, G, L, d]`` with the rows (or ``[B, H, G, L, count]`` for ``transpose=False``) -> ``[B, H, G, L, count or d]``."""
        return mx.quantized_matmul(x, *[part[:, :, None] for part in self.read()], transpose=transpose, group_size=group, bits=self.bits)


def _own(x: mx.array, start: int, end: int) -> mx.array:
    """Tokens ``start`` to ``end`` in memory of their own: a slice would keep the rest alive."""
    return mx.take(x, mx.arange(start, end), axis=2)


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    """A mask of fewer columns than scores ends where they end."""
    free = scores.shape[-1] - mask.shape[-1]
    if free:
        whole = mx.ones if mask.dtype == mx.bool_ else mx.zeros
        mask = mx.concatenate([whole((*mask.shape[:-1], free), mask.dtype), mask], -1)
    return mx.where(mask, scores, mx.finfo(scores.dtype).min) if mask.dtype == mx.bool_ else scores + mask


# -- the cache of a layer


class View:
    """What ``update_and_fetch`` hands to the attention in the place of keys or values."""

    def __init__(self, cache: PackedKVCache, fresh: mx.array | None, shape: tuple[int, ...]) -> None:
        self.cache, self.fresh, self.shape = cache, fresh, shape


class PackedKVCache(caches._BaseCache):
    """One layer of a prompt cache. ``bits`` and ``group_size`` make mlx-lm take its way for quantised caches, where our hook is."""

    def __init__(self, plan: Plan, near: bool = False) -> None:
        self.plan, self.near = plan, near
        self.hook = hook()
        self.clear()

    def clear(self) -> None:
        self.head_k: mx.array | None = None  # exact rows before and after the packed ones, [B, H, n, D]
        self.head_v: mx.array | None = None
        self.tail_k: mx.array | None = None
        self.tail_v: mx.array | None = None
        self.keys, self.values = Rows(self.plan.bits_k), Rows(self.plan.bits_v)
        self.mean: mx.array | None = None  # fp32 [B, H, 1, D]
        self.scale: mx.array | None = None
        self._q2: mx.array | None = None
        self.offset = self.calls = self.peak = 0
        self.began: float | None = None
        self.seconds = 0.0

    @property
    def bits(self) -> int:
        return self.plan.bits_k

    @property
    def group_size(self) -> int:
        return 64

    @property
    def packed(self) -> int:
        return self.keys.count

    @property
    def wants_queries(self) -> bool:
        return self.plan.calibrate > 0 and self.mean is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[View, View]:
        """New tokens ``keys [B, H, n, D], values [B, H, n, Dv]``, exact until :meth:`settle`."""
        now = time.process_time()
        self.began = now if self.began is None else self.began
        self.seconds, self.calls = now - self.began, self.calls + 1
        fresh = self.offset == 0
        if self.tail_k is None or self.tail_v is None:
            group_of(keys.shape[-1])
            group_of(values.shape[-1])
            self.tail_k, self.tail_v = keys, values
        else:
            for name, had, new in (("keys", self.tail_k, keys), ("values", self.tail_v, values)):
                if had.shape[:2] != new.shape[:2] or had.shape[3] != new.shape[3]:
                    raise TqaiError(
                        f"the cache holds {name} [batch, heads, tokens, dim] of {had.shape}, got {new.shape}: it belongs to another model "
                        "or batch; make a new one with make_prompt_cache(model)"
                    )
            self.settle()  # an attention that never came (a model that keeps its own) must not let the tail grow
            self.tail_k, self.tail_v = mx.concatenate([self.tail_k, keys], 2), mx.concatenate([self.tail_v, values], 2)
        self.offset += keys.shape[2]
        shape = (*keys.shape[:2], self.offset)
        return (
            View(self, keys if fresh else None, (*shape, keys.shape[3])),
            View(self, values if fresh else None, (*shape, values.shape[3])),
        )

    # -- statistics and packing

    def observe(self, q: mx.array) -> None:
        """Queries ``[B, heads, n, D]`` that go with the keys, until the statistics are taken."""
        assert self.tail_k is not None
        if not self.wants_queries or q.shape[-1] != self.tail_k.shape[-1]:
            return
        q = q[:, :, :: -(-q.shape[2] // SAMPLE)].astype(mx.float32)
        b, h = self.tail_k.shape[:2]
        squares = q.square().reshape(b, h, -1, q.shape[-1]).sum(2, keepdims=True)
        self._q2 = squares if self._q2 is None else self._q2 + squares

    def settle(self) -> None:
        """Pack what has left the recent window, if the statistics are there and at least 32 tokens are due."""
        plan = self.plan
        if self.tail_k is None or self.tail_v is None or self.offset < plan.calibrate:
            return
        sink = 0 if self.packed else plan.sink
        due = self.tail_k.shape[2] - sink - plan.recent
        if due < FLUSH:
            return
        if self.wants_queries:
            self._calibrate(self.tail_k[:, :, sink:])
        if not self.packed:
            self.head_k, self.head_v = _own(self.tail_k, 0, sink), _own(self.tail_v, 0, sink)
        k, v = (x[:, :, sink : sink + due].astype(mx.float32) for x in (self.tail_k, self.tail_v))
        if self.mean is not None and self.scale is not None:
            k = (k - self.mean) / self.scale
        dtype = mx.bfloat16 if self.tail_k.dtype == mx.bfloat16 else mx.float16
        self.peak = max(self.peak, self.nbytes)
        self.keys.add(k @ self._turn_k.T, dtype)
        self.values.add(v @ self._turn_v.T, dtype)
        rest = self.tail_k.shape[2]
        self.tail_k, self.tail_v = _own(self.tail_k, sink + due, rest), _own(self.tail_v, sink + due, rest)
        self.peak = max(self.peak, self.nbytes)

    @property
    def _turn_k(self) -> mx.array:
        assert self.tail_k is not None
        return _turn(self.tail_k.shape[3], self.plan.seed)

    @property
    def _turn_v(self) -> mx.array:
        assert self.tail_v is not None
        return _turn(self.tail_v.shape[3], self.plan.seed + 1)

    def _calibrate(self, k: mx.array) -> None:
        k = k[:, :, :: -(-k.shape[2] // SAMPLE)].astype(mx.float32)
        self.mean = k.mean(2, keepdims=True)
        if self._q2 is None:
            self.scale = mx.ones_like(self.mean)
        else:
            k2, q2 = self._pool((k - self.mean).square().mean(2, keepdims=True)), self._pool(self._q2)
            floor = 1e-6  # of the mean: a channel that is always zero must not get an infinite scale
            even = lambda x: x + floor * x.mean(-1, keepdims=True) + 1e-30  # noqa: E731
            log = mx.log(even(k2) / even(q2)) / 4
            self.scale = mx.exp(log - log.mean(-1, keepdims=True))
        self._q2 = None

    def _pool(self, x: mx.array) -> mx.array:
        """Sums over rotary pairs: (i, i + d/2), or neighbours where the model turns those (``near``)."""
        if not self.near:
            return x + mx.roll(x, x.shape[-1] // 2, axis=-1)
        pairs = x.reshape(*x.shape[:-1], -1, 2).sum(-1, keepdims=True)
        return mx.broadcast_to(pairs, (*pairs.shape[:-1], 2)).reshape(x.shape)

    # -- attention

    def attend(self, q: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
        """``q [B, heads, L, D]`` over all tokens -> ``[B, heads, L, Dv]``; a long prompt is read a block of queries at a time."""
        assert self.tail_k is not None
        assert self.tail_v is not None
        b, heads, length, d = q.shape
        h = self.tail_k.shape[1]
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
        """``q [B, H, G, L, D]``; ``mask`` is of the last tokens, as many as it has columns. Parts are never joined: no copy of scores."""
        assert self.tail_k is not None
        assert self.tail_v is not None
        dtype, q = q.dtype, q.astype(mx.float32) * scale
        if mask is not None and mask.ndim > 3:  # [B, heads or 1, L, columns]
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(len(mask), *q.shape[1:3], *mask.shape[2:])
        exact = [(self.tail_k, self.tail_v)]
        if self.head_k is not None and self.head_v is not None:
            exact.insert(0, (self.head_k, self.head_v))
        parts = []
        for k, _ in exact:
            if self.mean is not None:  # softmax ignores q . mean if it is taken from every key
                k = (k.astype(mx.float32) - self.mean).astype(dtype)
            parts.append(q.astype(dtype) @ k[:, :, None].swapaxes(-1, -2))
        if self.packed:
            turned = (q if self.scale is None else q * self.scale[:, :, None]) @ self._turn_k.T
            parts.insert(1, self.keys.matmul(turned.astype(dtype), True, group_of(q.shape[-1])))
        sizes = [part.shape[-1] for part in parts]
        if mask is not None:
            at = mask.shape[-1] - sum(sizes)
            for i, size in enumerate(sizes):
                at += size
                if at > 0:
                    parts[i] = _masked(parts[i], mask[..., max(at - size, 0) : at])
        top = reduce(mx.maximum, [part.max(-1, keepdims=True) for part in parts if part.shape[-1]])
        parts = [mx.exp(part.astype(mx.float32) - top) for part in parts]
        total = sum(part.sum(-1, keepdims=True) for part in parts)
        out = mx.zeros((), mx.float32)
        for part, held in zip(parts, [*exact[:1], None, *exact[1:]] if self.packed else exact, strict=True):
            if held is None:
                turned = self.values.matmul(part.astype(dtype), False, group_of(self.tail_v.shape[-1]))
                out = out + turned.astype(mx.float32) @ self._turn_v
            else:
                out = out + (part.astype(dtype) @ held[1][:, :, None]).astype(mx.float32)
        return (out / total).astype(dtype)

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
        self.offset, left = self.offset - n, n
        assert self.tail_k is not None
        assert self.tail_v is not None
        own = min(left, self.tail_k.shape[2])
        keep = self.tail_k.shape[2] - own
        self.tail_k, self.tail_v = _own(self.tail_k, 0, keep), _own(self.tail_v, 0, keep)
        left -= own
        rows = min(left, self.packed)
        self.keys.count, self.values.count = self.keys.count - rows, self.values.count - rows
        left -= rows
        if not self.packed and self.head_k is not None and self.head_v is not None:  # only sinks are left: they are the tail now
            keep = self.head_k.shape[2] - left
            self.tail_k = mx.concatenate([_own(self.head_k, 0, keep), self.tail_k], 2)
            self.tail_v = mx.concatenate([_own(self.head_v, 0, keep), self.tail_v], 2)
            self.head_k = self.head_v = None
            self.keys.parts, self.values.parts = [], []
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of every array that is kept, room to grow and statistics included."""
        return sum(x.nbytes for _, x in tree_flatten([self._arrays(), self.keys.parts, self.values.parts]) if isinstance(x, mx.array))

    def _arrays(self) -> list[mx.array | None]:
        return [self.head_k, self.head_v, self.tail_k, self.tail_v, self.mean, self.scale, self._q2]

    @property
    def state(self) -> list[Any]:
        """Arrays and numbers as ``mlx_lm.models.cache.save_prompt_cache`` wants them."""
        plan = self.plan
        numbers = [self.offset, self.packed, plan.bits_k, plan.bits_v, plan.sink, plan.recent, plan.calibrate, plan.seed, int(self.near)]
        return [self._arrays(), self.keys.read() or [None] * 3, self.values.read() or [None] * 3, numbers]

    @state.setter
    def state(self, given: Sequence[Any]) -> None:
        arrays, keys, values, numbers = given
        offset, count, *plan, near = (int(n) for n in numbers)
        self.plan, self.near, self.hook = Plan(*plan), bool(near), hook()
        self.clear()
        self.head_k, self.head_v, self.tail_k, self.tail_v, self.mean, self.scale, self._q2 = arrays
        for rows, parts in ((self.keys, keys), (self.values, values)):
            rows.parts, rows.count = [part for part in parts if part is not None], count
        self.offset = offset
        exact = sum(x.shape[2] for x in (self.head_k, self.tail_k) if x is not None)
        if exact + count != offset or any(len(rows.parts) != 3 * bool(count) for rows in (self.keys, self.values)):
            raise TqaiError(f"the state says {offset} tokens, its arrays hold {exact} + {count}: save the cache again")


# -- the hook


class Hook:
    """Stands in for mlx-lm's attention on quantised caches while a packed cache or a handle lives; others go through unchanged."""

    def __init__(self) -> None:
        before = base.quantized_scaled_dot_product_attention

        def attention(
            queries: mx.array, q_keys: Any, q_values: Any, scale: float, mask: Any, group_size: int = 64, bits: int = 8
        ) -> mx.array:
            if not isinstance(q_keys, View):
                return before(queries, q_keys, q_values, scale=scale, mask=mask, group_size=group_size, bits=bits)
            cache = q_keys.cache
            cache.observe(queries)
            if q_keys.fresh is not None and q_values.fresh is not None:
                out = mx.fast.scaled_dot_product_attention(queries, q_keys.fresh, q_values.fresh, scale=scale, mask=mask)
            else:
                out = cache.attend(queries, scale, mask)
            cache.settle()
            return out

        def undo() -> None:
            if base.quantized_scaled_dot_product_attention is attention:  # else someone else has put theirs on top, which calls ours
                base.quantized_scaled_dot_product_attention = before

        base.quantized_scaled_dot_product_attention = attention
        self.remove = weakref.finalize(self, undo)


_hook: weakref.ref[Hook] | None = None


def hook() -> Hook:
    """The one hook; it goes when nothing holds it any more."""
    global _hook
    found = _hook() if _hook is not None else None
    if found is None:
        found = Hook()
        _hook = weakref.ref(found)
    return found


# -- whole models


class PromptCache(list[Any]):
    """What ``prompt_cache=`` takes: a list of one cache a layer, with bytes and report."""

    config: Config
    why: list[dict[str, str]]

    @property
    def packed_layers(self) -> list[tuple[int, PackedKVCache]]:
        return [(i, layer) for i, layer in enumerate(self) if isinstance(layer, PackedKVCache)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, walked."""
        return sum(layer.nbytes for layer in self)

    def report(self) -> Report:
        """The keys of ``tqai.KVCache.report()``, since the cache was made."""
        report = Report(fallbacks=list(self.why))
        layers = self.packed_layers
        report.bytes_held_peak = sum(max(layer.peak, layer.nbytes) for _, layer in layers)
        report.bytes_held_peak += sum(layer.nbytes for layer in self if not isinstance(layer, PackedKVCache))
        for layer in self:
            if not isinstance(layer, PackedKVCache):
                report.bytes_exact += sum(2 * x.size for _, x in tree_flatten(layer.state) if isinstance(x, mx.array))
        for i, layer in layers:
            exact = 0
            if layer.tail_k is not None and layer.tail_v is not None:
                b, h, _, d = layer.tail_k.shape
                exact = 2 * layer.offset * b * h * (d + layer.tail_v.shape[3])
            report.bytes_exact += exact
            report.per_site[f"attn.{i}"] = {
                "bits_k": layer.plan.bits_k, "bits_v": layer.plan.bits_v, "tokens": layer.offset, "tokens_packed": layer.packed,
                "bytes_held": layer.nbytes, "bits_held": round(16 * layer.nbytes / exact, 4) if exact else 0.0, "materialised": 0,
            }  # fmt: skip
            if not (layer.keys.sound and layer.values.sound):
                report.warnings.append(f"attn.{i}: keys or values hold NaN or inf, as the exact cache's would")
        if layers:
            report.calls, report.evaluations = sum(layer.calls for _, layer in layers), layers[0][1].calls
            report.seconds_cpu = layers[0][1].seconds
            if report.evaluations and not any(layer.packed for _, layer in layers):
                wait = max(self.config.calibrate, self.config.sink + self.config.recent + FLUSH)
                report.warnings.append(f"nothing is packed yet: {layers[0][1].offset} tokens are held, packing starts at {wait}")
        return report


def make_prompt_cache(model: Any, config: Config | None = None) -> PromptCache:
    """A packed cache for ``prompt_cache=`` of mlx-lm's ``generate`` and ``stream_generate``, its layers as ``tqai.KVCache`` makes them.

    Layers that are no plain ``KVCache`` (rotating windows, state spaces) keep mlx-lm's own classes, and so do ``skip_layers``.
    Raises ValueError for a model whose attention does not go through mlx-lm's own function, or a head dimension that is
    no multiple of 32. One sequence length for the whole batch: mlx-lm's batched server is not for it.
    """
    config = Config(level="kv") if config is None else config
    if not isinstance(config, Config) or config.level != "kv":
        raise TqaiError(f"make_prompt_cache wants a tqai.Config(level='kv', ...), got {getattr(config, 'level', type(config).__name__)!r}")
    if methods := [name for name in ("scorer", "strategy", "monitor") if getattr(config, name)]:
        raise TqaiError(f"{' and '.join(methods)} asked: caches of mlx-lm are packed only; leave them out, or use transformers")
    if not hasattr(model, "layers"):
        raise TqaiError(f"make_prompt_cache wants a model of mlx_lm.load, got {type(model).__name__}")
    _check(model)
    made = PromptCache(caches.make_prompt_cache(model))
    made.config, made.why = config, []
    full = [i for i, layer in enumerate(made) if type(layer) is caches.KVCache]
    codec: Any = build("codec", config.codec)
    skip = chosen(config.skip_layers, len(made))
    bits_k, bits_v = (codec.bits_k or codec.bits, codec.bits_v or codec.bits) if codec.name != "exact" else (0, 0)
    strong = strong_layers(full, config.protect)
    for i, layer in enumerate(made):
        if codec.name == "exact" or i not in full or i in skip:
            why = "codec exact" if codec.name == "exact" else "skip_layers" if i in skip else f"{type(layer).__name__} keeps its own form"
            made.why.append({"where": f"attn.{i}", "why": why})
            continue
        least = 8 if i in strong else 0
        plan = Plan(max(bits_k, least), max(bits_v, least), config.sink, config.recent, config.calibrate, codec.seed)
        rope = getattr(getattr(model.layers[i], "self_attn", None), "rope", None)
        made[i] = PackedKVCache(plan, near=bool(getattr(rope, "traditional", False)))
    return made


def _check(model: Any) -> None:
    homes = [sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__.startswith("mlx_lm.models.")]
    names = {type(layer).__module__ for layer in model.layers if layer is not None}
    homes += [sys.modules[name] for name in names if name in sys.modules]
    ours = base.scaled_dot_product_attention
    if not any(getattr(home, "scaled_dot_product_attention", None) is ours for home in homes):
        raise TqaiError(f"{type(model).__module__} does not attend through mlx_lm.models.base: use mlx-lm's own cache for this model")
    if any("sinks" in getattr(layer, "self_attn", {}) for layer in model.layers):
        raise TqaiError(f"{type(model).__module__} has attention sinks of its own, which mlx-lm's quantised attention refuses")


def load_prompt_cache(path: str | Path, model: Any = None) -> PromptCache:
    """What ``mlx_lm.models.cache.save_prompt_cache`` wrote of a packed cache. ValueError for a damaged file or another model's."""
    known = vars(caches)
    had = known.get("PackedKVCache")
    known["PackedKVCache"] = PackedKVCache  # mlx-lm looks classes up by name in its own module
    try:
        made = PromptCache(caches.load_prompt_cache(str(path)))
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise TqaiError(f"{path}: not a readable prompt cache ({error}): save the cache again") from None
    finally:
        if had is None:
            del known["PackedKVCache"]
    if model is not None and len(made) != len(model.layers):
        raise TqaiError(f"{path}: a cache of {len(made)} layers, the model has {len(model.layers)}: load it with the model that filled it")
    plan = next((layer.plan for _, layer in made.packed_layers), Plan())
    made.config = Config(
        level="kv", sink=plan.sink, recent=plan.recent, calibrate=plan.calibrate,
        codec={"name": "turbo", "bits_k": plan.bits_k, "bits_v": plan.bits_v, "seed": plan.seed},
    )  # fmt: skip
    made.why = [
        {"where": f"attn.{i}", "why": f"{type(x).__name__} keeps its own form"} for i, x in enumerate(made) if type(x) is not PackedKVCache
    ]
    return made


class MLXHandle(Handle):
    """What ``tqai.apply`` returns for a model of mlx-lm. ``cache()`` makes caches for ``prompt_cache=``."""

    def __init__(self, model: Any, config: Config) -> None:
        super().__init__()
        make_prompt_cache(model, config)  # says what cannot be packed
        self.model, self.config = model, config
        self._hook: Hook | None = hook()
        self._last: PromptCache | None = None
        self._report = Report(warnings=["nothing has run yet: handle.cache() makes a cache for prompt_cache="])

    def cache(self) -> PromptCache:
        self._last = make_prompt_cache(self.model, self.config)
        return self._last

    @property
    def nbytes(self) -> int:
        """Bytes of the cache made last."""
        return self._last.nbytes if self._last is not None else 0

    def report(self) -> Report:
        return self._last.report() if self._last is not None else self._report

    def remove(self) -> None:
        """Caches that still live keep the hook, through which everything else goes unchanged."""
        self._report, self._last, self._hook = self.report(), None, None
        super().remove()


def attach(model: Any, config: Config, steps: int | None = None) -> MLXHandle:
    if config.level != "kv":
        raise TqaiError(f"{type(model).__name__} is a language model: give tqai.Config(level='kv', ...), got level={config.level!r}")
    return MLXHandle(model, config)


def mini(variant: str = "plain") -> Any:
    """The trained mini language model (:func:`tqai_core.minis.lm`) as mlx-lm's Qwen2, fp32. Needs transformers too."""
    from mlx_lm.models import qwen2

    from .transformers import minis as lm

    source = lm.model(variant)
    more = {"model_type": "qwen2", "rms_norm_eps": source.config.rms_norm_eps}
    model = qwen2.Model(qwen2.ModelArgs.from_dict(json.loads(lm._file()[0]["config"]) | more))
    model.load_weights([(name, mx.array(w.numpy())) for name, w in source.state_dict().items()])
    return model
