"""Attention that reads a packed cache in place: no key and no value is ever made dense.

Each tier of rows takes a softmax of its own, by the first backend that can, and the states are
merged. What the cache's methods change comes from its policy as data.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..codecs.rows import Scratch
from ..errors import TqaiError
from ..kv.cache import PackedKV
from . import eager
from .backends import Backend, triton_packed
from .backends import native as native_kernel
from .call import Call, Mask
from .eager import FEW

SCORES = 1 << 20  # scores of a block of queries: as many queries are taken together
PACKED = (  # ``run(call, tier, change)`` gives the softmax over the rows of the tier, or None where it failed
    Backend("native", native_kernel.takes, native_kernel.run),
    Backend("triton", triton_packed.takes, triton_packed.run),
    Backend("torch", lambda call, tier, change: "", eager.run),
)


def attend(
    query: Tensor, kv: PackedKV, *, scaling: float, mask: Tensor | None = None, softcap: float | None = None, aux: Tensor | None = None,
    native: bool = True,
) -> Tensor:  # fmt: skip
    """``softmax(scaling q k^T + mask) v`` for the last tokens of ``kv``.

    ``query [B, heads, Q, D]``; ``mask`` broadcasts over ``[B, heads, Q, tokens]``, bool (True = attend) or added; without one
    it is causal, aligned at the end. ``softcap``: tanh cap of the scores. ``aux [heads]``: a logit that takes weight and has no
    value. ``native=False`` keeps to the reference in torch. Returns ``[B, heads, Q, Dv]`` in the query's dtype, without gradient.
    """
    mask = kv.in_rows(mask)
    out = native_kernel.whole(query, kv, scaling, mask, softcap, aux) if native else None
    return _by_tiers(query, kv, scaling, mask, softcap, aux, PACKED if native else PACKED[-1:]) if out is None else out


@torch.no_grad()
def _by_tiers(
    query: Tensor, kv: PackedKV, scaling: float, mask: Tensor | None, softcap: float | None, aux: Tensor | None,
    backends: tuple[Backend, ...],
) -> Tensor:  # fmt: skip
    keys, values = kv.exact
    (b, heads, count, d), h = query.shape, keys.shape[1]
    if heads % h or b != keys.shape[0]:
        raise TqaiError(f"query has batch {b} and {heads} heads, the cache {list(keys.shape[:2])}: heads must be a multiple")
    out = query.new_empty(b, heads, count, values.shape[-1])
    tiers, sinks, packed = kv.tiers(ordered=mask is not None or count > 1), kv.sinks, kv.packed
    step = max(SCORES // (b * heads * kv.policy.score_width(kv.length)), 1)
    scratch, precise = scratch_for(query), query.dtype == torch.float32
    for i in range(0, count, step):
        j = min(i + step, count)
        q = (query[:, :, i:j].float() * scaling).reshape(b, h, heads // h * (j - i), d)
        seen, state = Mask.of(mask, i, j, count, kv.length, query.device), None
        for tier, change in zip(tiers, kv.policy.adjust(q, tiers, count), strict=True):
            call = Call(q, j - i, seen.of_tier(tier, sinks, packed), softcap, aux if state is None else None, precise, scratch)
            for backend in backends:
                if not backend.takes(call, tier, change) and (new := backend.run(call, tier, change)) is not None:
                    break
            state = new if state is None else state.merge(new.top[None], new.weight[None], new.sum[None])
        assert state is not None
        out[:, :, i:j] = state.result().view(b, heads, j - i, -1)
    return out


def scratch_for(query: Tensor) -> Scratch:
    """Memory to work in: of a few queries on a CPU the thread's own (about 1.3 MiB), or each layer and token would touch fresh pages."""
    if query.device.type != "cpu" or query.shape[0] * query.shape[1] * query.shape[2] > FEW:
        return Scratch()
    if not hasattr(_own, "scratch"):
        _own.scratch = Scratch()
    return _own.scratch


_own = threading.local()
