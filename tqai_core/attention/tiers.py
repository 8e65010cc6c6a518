"""Packed attention for a cache whose methods sort rows into tiers, predict keys, or choose what is read.

Each tier is a cache of its own kind of rows (:meth:`kv_methods.Policy.bands`); its softmax is taken by the kernels of
:mod:`attention.packed`, and the tiers are joined as parts of one softmax are. Predicted keys add a number to the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TqaiError
from ..kv.cache import PackedKV
from ..kv.policy import Policy
from . import packed

CHOICE = 64  # queries that together choose blocks; calls of more read all of them


@torch.no_grad()
def attend(
    query: Tensor, kv: PackedKV, *, scaling: float, mask: Tensor | None = None, softcap: float | None = None, aux: Tensor | None = None,
    native: bool = True,
) -> Tensor:  # fmt: skip
    """:func:`attention.packed.attend`, whatever methods the cache has."""
    if kv.policy is None or not kv.packed:
        return packed.attend(query, kv, scaling=scaling, mask=mask, softcap=softcap, aux=aux, native=native)
    assert kv.keys is not None
    assert kv.values is not None
    b, heads, count, d = query.shape
    h = kv.keys.shape[1]
    if heads % h or b != kv.keys.shape[0]:
        raise TqaiError(f"query has batch {b} and {heads} heads, the cache {list(kv.keys.shape[:2])}: heads must be a multiple")
    out = query.new_empty(b, heads, count, kv.values.shape[-1])
    ordered = mask is not None or count > 1 or kv.policy.gate or kv.policy.reads  # else nobody asks which row is whose
    places, scratch = kv.policy.places(kv) if ordered else [None, None], packed.scratch_for(query)
    step = max(packed.SCORES // (b * heads * kv.length), 1)
    for i in range(0, count, step):
        j = min(i + step, count)
        q = (query[:, :, i:j].float() * scaling).reshape(b, h, heads // h * (j - i), d)
        turned = kv.coder_k().rotate(q if kv.scale is None else q * kv.scale)
        run, weight = None, _exact_weight(q, kv) if kv.policy.near and count <= CHOICE else None
        for n, (band, own) in enumerate(zip(kv.policy.bands(kv), places, strict=False)):
            seen = packed._Mask(mask, i, j, count, kv.length, q.device)
            if own is not None:
                seen = _sorted(seen, kv, own, first=n == 0, count=j - i)
            part = _part(kv.policy, band, turned, own, count, weight)
            new = packed.state(q, band, j - i, seen, softcap, aux if n == 0 else None, scratch, native, query.dtype == torch.float32, part)
            run = new if run is None else _join(run, new)
        assert run is not None
        out[:, :, i:j] = (run[0] / run[1].clamp_min(1e-30)).view(b, heads, j - i, -1)
    return out


def _exact_weight(q: Tensor, kv: PackedKV) -> Tensor:
    """Logarithm of the weight of the exact rows, on the scale of stored keys, ``[B, H, rows of q, 1]``."""
    assert kv.keys is not None
    weight = (q @ kv.keys.float().transpose(-1, -2)).logsumexp(-1, keepdim=True)
    return weight if kv.mean is None else weight - (q * kv.mean).sum(-1, keepdim=True)


def _part(policy: Policy, band: PackedKV, q: Tensor, places: Tensor | None, count: int, weight: Tensor | None) -> packed.Part:
    if not band.packed:
        return packed.ALL
    added = policy.shift(q, places, band.packed)
    read = policy.reading(q, places, band.packed, weight) if policy.reads and count <= CHOICE else None
    return packed.ALL if added is None and read is None else packed.Part(added, read, policy.span)


def _join(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    top = torch.maximum(a[2], b[2])
    mine, theirs = torch.exp(a[2] - top), torch.exp(b[2] - top)
    return a[0] * mine + b[0] * theirs, a[1] * mine + b[1] * theirs, top


def _sorted(seen: packed._Mask, kv: PackedKV, places: Tensor, first: bool, count: int) -> packed._Mask:
    """The mask with its columns as a tier has them: its own packed tokens, and before and after them, in the first tier, the
    exact ones."""
    if seen.mask is None and seen.causal is None:
        return seen
    columns = kv.sinks + places
    if first:
        ends = ((0, kv.sinks), (kv.sinks + kv.packed, kv.length))
        before, after = (torch.arange(a, b, device=places.device).expand(len(places), -1) for a, b in ends)
        columns = torch.cat([before, columns, after], 1)
    if seen.causal is not None:
        mask = columns[:, None, None] <= seen.causal[None, None]
    else:
        whole = seen.mask
        assert whole is not None
        b = max(whole.shape[0], len(columns))
        mask = whole.expand(b, -1, -1, -1).gather(3, columns[:, None, None].expand(b, *whole.shape[1:3], -1))
    return packed._Mask(mask, 0, mask.shape[2], mask.shape[2], columns.shape[1], places.device)
