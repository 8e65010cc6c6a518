"""Attention that reads a packed cache where it lies: no key and no value is ever made dense.

Scores are taken in the rotated domain by table lookup, a chunk of tokens at a time, with an online softmax (Milakov and
Gimelshein 1805.02867); the query heads of a group share each lookup, and the sum of values is rotated back once. The first
sinks and the recent window come first: once they hold nearly all the weight, the values of a chunk that adds less than a
millionth are not looked up ("sparse V").
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.rows import Rows, Scratch
from ..errors import TqaiError
from ..kv.cache import PackedKV, Segment
from .backends import native as kernel
from .backends import triton_packed
from .products import FEW, Queries, add_values

GROUP = 1 << 15  # scores that one softmax sees at a time
SCORES = 1 << 20  # the same where many queries come together
NEGLIGIBLE = 1e-6  # share of the weight so far below which a chunk's values are skipped; on CPUs only: it asks the device


@torch.no_grad()
def attend(
    query: Tensor, kv: PackedKV, *, scaling: float, mask: Tensor | None = None, softcap: float | None = None, aux: Tensor | None = None,
    native: bool = True,
) -> Tensor:  # fmt: skip
    """``softmax(scaling q k^T + mask) v`` for the last tokens of ``kv``.

    ``query [B, heads, Q, D]``; ``mask`` broadcasts over ``[B, heads, Q, tokens]``, bool (True = attend) or added; without one
    it is causal, aligned at the end. ``softcap``: tanh cap of the scores. ``aux [heads]``: a logit that takes weight and has no
    value. ``native=False`` keeps to torch where a kernel would take a few queries (:mod:`attention.native`, on a CPU).
    Returns ``[B, heads, Q, Dv]`` in the query's dtype, without gradient.
    """
    assert kv.keys is not None
    assert kv.values is not None
    b, heads, count, _ = query.shape
    if heads % kv.keys.shape[1] or b != kv.keys.shape[0]:
        raise TqaiError(f"query has batch {b} and {heads} heads, the cache {list(kv.keys.shape[:2])}: heads must be a multiple")
    out = query.new_empty(b, heads, count, kv.values.shape[-1])
    block = max(SCORES // (b * heads * min(max(kv.length, 1), 1024)), 1)
    scratch = scratch_for(query)
    for i in range(0, count, block):
        j = min(i + block, count)
        seen = _Mask(mask, i, j, count, kv.length, query.device)
        out[:, :, i:j] = _attend(query[:, :, i:j], kv, scaling, seen, softcap, aux, scratch, native)
    return out


def _attend(
    query: Tensor, kv: PackedKV, scaling: float, seen: _Mask, softcap: float | None, aux: Tensor | None, scratch: Scratch, native: bool
) -> Tensor:
    assert kv.keys is not None
    assert kv.values is not None
    b, heads, count, d = query.shape
    h, dv = kv.keys.shape[1], kv.values.shape[-1]
    q = (query.float() * scaling).reshape(b, h, heads // h * count, d)
    total, weight, _ = state(q, kv, count, seen, softcap, aux, scratch, native, query.dtype == torch.float32)
    return (total / weight.clamp_min(1e-30)).view(b, heads, count, dv)


@dataclass(frozen=True)
class Part:
    """What methods make of the packed rows (:mod:`attention.tiers`): ``added [B, H, rows of q, packed]`` to their scores, and the
    blocks of ``block`` tokens that are ``read``, bool ``[B, H, blocks]``."""

    added: Tensor | None = None
    read: Tensor | None = None
    block: int = 1


ALL = Part()


def state(
    q: Tensor, kv: PackedKV, count: int, seen: _Mask, softcap: float | None, aux: Tensor | None, scratch: Scratch, native: bool,
    precise: bool, part: Part = ALL,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Where the softmax of ``q [B, H, group x count, D]`` (scaled) over ``kv`` ends: weighted sum, weight and maximum."""
    assert kv.keys is not None
    assert kv.values is not None
    dv, group = kv.values.shape[-1], q.shape[2] // count
    if native and kv.segments:
        done = kernel.attend(
            q, kv, count=count, mask=seen.mask, seen=seen.first, softcap=softcap, aux=aux, precise=precise, part=part
        )  # fmt: skip
        if done is not None:
            return done
    run = _Softmax(q, dv, aux, group, count)
    exact = kv.keys.shape[2]
    for a in range(0, exact, 1024):
        e = min(a + 1024, exact)
        s = q @ kv.keys[:, :, a:e].float().transpose(-1, -2)
        p = run.weigh(_cap(s, softcap), seen.exact(a, e, kv))
        run.sum += p @ kv.values[:, :, a:e].float()
    if kv.segments:
        run.sum = kv.coder_v().rotate(run.sum)
        _packed(q, kv, run, seen, softcap, scratch, native, part, precise)
        run.sum = kv.coder_v().unrotate(run.sum)
    return run.sum, run.weight, run.top


def _packed(
    q: Tensor, kv: PackedKV, run: _Softmax, seen: _Mask, softcap: float | None, scratch: Scratch, native: bool, use: Part, precise: bool
) -> None:  # fmt: skip
    """Adds the packed tokens to ``run``."""
    keys, values = kv.coder_k(), kv.coder_v()
    shift = None
    if kv.mean is not None and kv.scale is not None:
        shift = (q * kv.mean).sum(-1, keepdim=True)
        q = q * kv.scale
    b, h, r, _ = q.shape
    q = keys.rotate(q)
    if use is not ALL:
        _partly(q, kv, run, seen, softcap, scratch, shift, use)
        return
    if native and isinstance(values, Rows) and triton_packed.wanted(q, keys.bits, values.bits):
        triton_packed.attend(
            kv.segments, q, shift, keys, values, mask=seen.at(0, kv.length), first=kv.sinks, group=run.group, softcap=softcap,
            top=run.top, weight=run.weight, total=run.sum,
        )  # fmt: skip
        return
    asked = Queries(q.flatten(0, 1), keys, precise)
    position = kv.sinks
    for group in _groups(kv, max(GROUP // (b * h * r), 1)):
        sizes = [len(segment) for segment in group]
        s = scratch.take("scores", (b * h, r, sum(sizes)), torch.float32, q.device)
        for segment, part in zip(group, s.split(sizes, 2), strict=True):
            asked.scores(segment.codes_k, part, scratch)
        s.mul_(_joined([segment.gain_k for segment in group])[:, None])
        if asked.unit is not None:
            s.mul_(asked.unit)
        if shift is not None:
            s.add_(shift.flatten(0, 1))
        p = run.weigh(_cap(s, softcap).view(b, h, r, -1), seen.at(position, position + s.shape[2]))
        _add_values(p, group, sizes, kv, run, scratch)
        position += s.shape[2]


def _add_values(p: Tensor, group: list[Segment], sizes: list[int], kv: PackedKV, run: _Softmax, scratch: Scratch) -> None:
    """Adds the values of ``group`` with the weights ``p [B, H, r, tokens]``."""
    p, values = p.flatten(0, 1), kv.coder_v()
    wanted = [True] * len(group)
    if p.device.type == "cpu" and kv.packed > p.shape[2]:  # asking costs more than a few segments
        shares = torch.stack([part.sum(-1) for part in p.split(sizes, 2)])
        wanted = (shares > run.weight.flatten(0, 1)[None, ..., 0] * NEGLIGIBLE).flatten(1).any(1).tolist()
    rows = [values.parts(segment.codes_v, segment.gain_v) for segment in group]
    for i, sums in enumerate(values.cut(run.sum.flatten(0, 1))):
        weights = scratch.take("weights", p.shape, torch.float32, p.device)
        torch.mul(p, _joined([own[i][2] for own in rows])[:, None], out=weights)
        for own, weight, want in zip(rows, weights.split(sizes, 2), wanted, strict=True):
            if want:
                add_values(weight, own[i][1], own[i][0], sums, scratch)


def scratch_for(query: Tensor) -> Scratch:
    """Memory to work in: of a few queries on a CPU the thread's own (about 1.3 MiB), or each layer and token would touch fresh pages."""
    if query.device.type != "cpu" or query.shape[0] * query.shape[1] * query.shape[2] > FEW:
        return Scratch()
    if not hasattr(_own, "scratch"):
        _own.scratch = Scratch()
    return _own.scratch


_own = threading.local()


def _joined(gains: list[Tensor]) -> Tensor:
    """Gains ``[B, H, n]`` of segments in a row, ``fp32 [B x H, tokens]``."""
    return (gains[0] if len(gains) == 1 else torch.cat(gains, 2)).float().flatten(0, 1)


def _partly(
    q: Tensor, kv: PackedKV, run: _Softmax, seen: _Mask, softcap: float | None, scratch: Scratch, shift: Tensor | None, part: Part
) -> None:
    """The same a segment at a time; on a CPU the rows of blocks that are not read are not looked up."""
    keys, values = kv.coder_k(), kv.coder_v()
    first, at = kv.sinks, 0
    for segment in kv.segments:
        n = len(segment)
        read = None if part.read is None else part.read[:, :, at // part.block : (at + n) // part.block].repeat_interleave(part.block, 2)
        if read is None or read.device.type != "cpu":
            s = (q @ keys.lookup(segment.codes_k, scratch).transpose(-1, -2)).mul_(segment.gain_k[:, :, None].float())
            if read is not None:
                s.masked_fill_(~read[:, :, None], float("-inf"))
        else:
            chosen = [own.nonzero().view(-1) for own in read.flatten(0, 1)]
            if not any(map(len, chosen)):
                at += n
                continue
            s = q.new_full((*q.shape[:3], n), float("-inf"))
            parts = (x.flatten(0, 1) for x in (q, segment.codes_k, segment.gain_k, s))
            for own, codes, gain, out, rows in zip(*parts, chosen, strict=True):
                out[:, rows] = own @ keys.lookup(codes[rows]).T * gain[rows].float()
        s = s if shift is None else s.add_(shift)
        s = s if part.added is None else s.add_(part.added[..., at : at + n])
        p = run.weigh(_cap(s, softcap), seen.at(first + at, first + at + n))
        if read is None or read.device.type != "cpu":
            for (coder, codes, gain), sums in zip(values.parts(segment.codes_v, segment.gain_v), values.cut(run.sum), strict=True):
                sums += (p * gain[:, :, None].float()) @ coder.lookup(codes, scratch)
        else:
            for (coder, *held), sums in zip(values.parts(segment.codes_v, segment.gain_v), values.cut(run.sum), strict=True):
                parts = (x.flatten(0, 1) for x in (p, *held, sums))
                for own, codes, gain, out, rows in zip(*parts, chosen, strict=True):
                    out += (own[:, rows] * gain[rows].float()) @ coder.lookup(codes[rows])
        at += n


def _groups(kv: PackedKV, tokens: int) -> Iterator[list[Segment]]:
    """Neighbouring segments of about so many tokens, at least one."""
    group: list[Segment] = []
    for segment in kv.segments:
        if group and sum(map(len, group)) + len(segment) > tokens:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _cap(s: Tensor, softcap: float | None) -> Tensor:
    return s if softcap is None else (s / softcap).tanh_().mul_(softcap)


class _Softmax:
    """Running maximum, weight and weighted sum ``[B, H, group x queries, ...]``, fp32."""

    def __init__(self, q: Tensor, dv: int, aux: Tensor | None, group: int, count: int) -> None:
        self.group, self.count = group, count
        self.sum = q.new_zeros(*q.shape[:3], dv)
        if aux is None:  # finite: a row that may see nothing stays zero instead of NaN
            self.top, self.weight = q.new_full((*q.shape[:3], 1), -1e30), q.new_zeros(*q.shape[:3], 1)
        else:
            self.top = aux.float().view(1, q.shape[1], group, 1, 1).expand(q.shape[0], -1, -1, count, 1).reshape(*q.shape[:3], 1).clone()
            self.weight = torch.ones_like(self.top)

    def weigh(self, s: Tensor, mask: Tensor | None) -> Tensor:
        """Scores ``[B, H, group x queries, n]`` (overwritten) -> their weights relative to the new maximum."""
        if mask is not None:
            wide = s.view(*s.shape[:2], self.group, self.count, s.shape[-1])
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (s.shape[1], self.group))
            if mask.dtype == torch.bool:
                wide.masked_fill_(~mask, float("-inf"))
            else:
                wide.add_(mask)
        top = torch.maximum(self.top, s.amax(-1, keepdim=True))
        shrink = torch.exp(self.top - top)
        p = s.sub_(top).exp_()
        self.weight = self.weight * shrink + p.sum(-1, keepdim=True)
        self.sum *= shrink
        self.top = top
        return p


class _Mask:
    """The rows ``i`` to ``j`` of a mask over ``length`` tokens, given or causal, cut to the columns asked for."""

    def __init__(self, mask: Tensor | None, i: int, j: int, count: int, length: int, device: torch.device) -> None:
        self.causal: Tensor | None = None
        self.first = 0  # tokens that the first row sees; 0: no causal mask
        if mask is None and count > 1:
            self.first = length - count + i + 1
            self.causal = torch.arange(length - count + i, length - count + j, device=device)[:, None]
        self.mask = None if mask is None else mask[:, :, i:j] if mask.shape[2] > 1 else mask

    def at(self, a: int, b: int) -> Tensor | None:
        """Columns of positions ``a`` to ``b``: ``[B or 1, heads or 1, rows, b - a]``, or None where all are seen."""
        if self.mask is not None:
            return self.mask[..., a:b]
        if self.causal is None:
            return None
        return (torch.arange(a, b, device=self.causal.device)[None] <= self.causal)[None, None]

    def exact(self, a: int, b: int, kv: PackedKV) -> Tensor | None:
        """Columns of the exact rows ``a`` to ``b``, which lie on both sides of the packed ones."""
        if self.mask is None and self.causal is None:
            return None
        front, gap = kv.sinks, kv.packed
        parts = [self.at(a, min(b, front))] if a < front else []
        if b > front:
            parts.append(self.at(max(a, front) + gap, b + gap))
        known = [part for part in parts if part is not None]
        return known[0] if len(known) == 1 else torch.cat(known, dim=-1)
