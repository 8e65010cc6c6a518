"""Packed attention in torch: the reference of all kernels.

Scores are taken in the rotated domain by table lookup, a chunk of tokens at a time; the query heads of a group share each
lookup, and the sum of values is rotated back once. The exact rows come first: once they hold nearly all the weight, the
values of a chunk that adds less than a millionth are not looked up ("sparse V").

In floats, each level is looked up as four bytes. Where the CPU multiplies bytes (AVX512-VNNI), the levels of keys of 2, 3, 4 and 8
bits are looked up as one byte each, four at a time, and queries of 16 bits are written as two digits of base 128: products of
integers are exact, and the digits keep 15 bits. Values gain nothing from it: their weights would have to be taken apart at
each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..codecs.rows import Rows, Scratch
from ..kv.segments import UNCHANGED, Adjustment, BitTier, Segment, rows_in
from .call import Call, OnlineSoftmax

GROUP = 1 << 15  # scores that one softmax sees at a time
CHUNK = 1 << 17  # coordinates looked up at a time on a CPU: half a MiB of fp32 stays in its cache
FEW = 64  # queries of a head up to which looking up is what costs
NEGLIGIBLE = 1e-6  # share of the weight so far below which a chunk's values are skipped; on CPUs only: it asks the device


def run(call: Call, tier: BitTier, change: Adjustment) -> OnlineSoftmax:
    """The softmax of ``call.q`` over the rows of ``tier``."""
    state = exact_rows(call, tier)
    if tier.segments:
        state.sum = tier.coder_v.rotate(state.sum)
        _packed_rows(call, tier, change, state)
        state.sum = tier.coder_v.unrotate(state.sum)
    return state


def exact_rows(call: Call, tier: BitTier) -> OnlineSoftmax:
    """The softmax over the exact rows alone."""
    state, exact = call.begin(tier.values.shape[-1]), tier.keys.shape[2]
    for a in range(0, exact, 1024):
        e = min(a + 1024, exact)
        s = call.capped(call.q @ tier.keys[:, :, a:e].float().transpose(-1, -2))
        p = state.weigh(call.masked(s, call.mask.exact(a, e, tier)))
        state.sum += p @ tier.values[:, :, a:e].float()
    return state


def rotated(q: Tensor, tier: BitTier) -> tuple[Tensor, Tensor | None]:
    """Queries in the domain of the stored keys, and what the mean of the keys adds to their scores ``[..., rows, 1]``."""
    if tier.mean is None or tier.scale is None:
        return tier.coder_k.query(q), None
    return tier.coder_k.query(q * tier.scale), (q * tier.mean).sum(-1, keepdim=True)


def _packed_rows(call: Call, tier: BitTier, change: Adjustment, state: OnlineSoftmax) -> None:
    """Adds the packed rows to ``state``, whose sum is in the domain of the stored values."""
    q, shift = rotated(call.q, tier)
    b, h, r, _ = q.shape
    plain, at, scratch = change is UNCHANGED, 0, call.scratch
    asked = Queries(q.flatten(0, 1), tier.coder_k, call.precise or not plain)
    for group in _groups(tier.segments, max(GROUP // (b * h * r), 1) if plain else 1):
        sizes = [len(segment) for segment in group]
        end = at + sum(sizes)
        read = None if change.read is None else change.read[:, :, at // change.block : end // change.block]
        read = None if read is None else read.repeat_interleave(change.block, 2)
        chosen: list[Tensor | slice] | None = None  # the rows of a segment that each head reads: a CPU looks up no others
        if not plain and q.device.type == "cpu":
            chosen = [slice(None)] * (b * h) if read is None else [own.nonzero().view(-1) for own in read.flatten(0, 1)]
        flat = scratch.take("scores", (b * h, r, end - at), torch.float32, q.device)
        for segment, part in zip(group, flat.split(sizes, 2), strict=True):
            asked.scores(segment.codes_k, part, scratch, chosen)
        flat.mul_(_joined([segment.gain_k for segment in group])[:, None])
        if asked.unit is not None:
            flat.mul_(asked.unit)
        if shift is not None:
            flat.add_(shift.flatten(0, 1))
        s = flat.view(b, h, r, -1)
        if change.offsets is not None:
            s.add_(change.offsets[..., at:end])
        s = call.capped(s)
        if read is not None:
            s.masked_fill_(~read[:, :, None], float("-inf"))
        p = state.weigh(call.masked(s, call.mask.at(tier.sinks + at, tier.sinks + end)))
        _add_values(p, group, sizes, tier, state, call, chosen)
        at = end


def _add_values(
    p: Tensor, group: list[Segment], sizes: list[int], tier: BitTier, state: OnlineSoftmax, call: Call, chosen: list[Tensor | slice] | None
) -> None:
    """Adds the values of ``group`` with the weights ``p [B, H, r, tokens]``."""
    p, values, scratch = p.flatten(0, 1), tier.coder_v, call.scratch
    wanted = [True] * len(group)
    if p.device.type == "cpu" and tier.packed > p.shape[2] and chosen is None:  # asking costs more than a few segments
        shares = torch.stack([part.sum(-1) for part in p.split(sizes, 2)])
        wanted = (shares > state.weight.flatten(0, 1)[None, ..., 0] * NEGLIGIBLE).flatten(1).any(1).tolist()
    rows = [values.parts(segment.codes_v, segment.gain_v) for segment in group]
    for i, sums in enumerate(values.cut(state.sum.flatten(0, 1))):
        weights = scratch.take("weights", p.shape, torch.float32, p.device)
        torch.mul(p, _joined([own[i][2] for own in rows])[:, None], out=weights)
        for own, weight, want in zip(rows, weights.split(sizes, 2), wanted, strict=True):
            if want:
                add_values(weight, own[i][1], own[i][0], sums, scratch, chosen)


def _joined(gains: list[Tensor]) -> Tensor:
    """Gains ``[B, H, n]`` of segments in a row, ``fp32 [B x H, tokens]``."""
    return (gains[0] if len(gains) == 1 else torch.cat(gains, 2)).float().flatten(0, 1)


def _groups(segments: Sequence[Segment], tokens: int) -> Iterator[list[Segment]]:
    """Neighbouring segments of at most ``tokens`` rows together, but at least one."""
    group: list[Segment] = []
    for segment in segments:
        if group and rows_in(group) + len(segment) > tokens:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


@lru_cache
def multiplies_bytes() -> bool:
    """Whether torch has products of bytes that this CPU has instructions for."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)()) and hasattr(torch, "_int_mm")


class Queries:
    """Rotated queries ``fp32 [B x H, r, d]`` that meet keys of ``coder``; ``precise`` keeps all their bits."""

    def __init__(self, q: Tensor, coder: Rows, precise: bool) -> None:
        self.q, self.coder = q, coder
        self.unit: Tensor | None = None
        if q.device.type == "cpu" and q.shape[1] <= FEW and coder.step and not precise and multiplies_bytes():
            unit = q.abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(127 * 128)
            whole = (q / unit).round_()
            first = (whole / 128).round_()
            self.digits = torch.cat([first, whole.sub_(first, alpha=128)], 1).to(torch.int8)
            self.unit = unit * coder.step

    def scores(self, codes: Tensor, out: Tensor, scratch: Scratch, chosen: list[Tensor | slice] | None = None) -> None:
        """Products with the levels of ``codes uint8 [B, H, n, bytes]``, in units of ``unit`` where it is set, into ``out
        [B x H, r, n]``. ``chosen``: the rows that each head reads, all others give 0; wants precise queries."""
        codes = codes.flatten(0, 1)
        if chosen is not None:
            for own, theirs, to, rows in zip(self.q, codes, out.zero_(), chosen, strict=True):
                if len(some := theirs[rows]):
                    to[:, rows] = own @ self.coder.lookup(some).T
            return
        if self.unit is None:
            pieces = _pieces(codes, self.coder)
            for own, theirs, to in zip(self.q.chunk(pieces), codes.chunk(pieces), out.chunk(pieces), strict=True):
                torch.bmm(own, self.coder.lookup(theirs, scratch).transpose(1, 2), out=to)
            return
        sums = scratch.take("products", (*self.digits.shape[:2], codes.shape[1]), torch.int32, codes.device)
        for own, theirs, to in zip(self.digits.unbind(), codes.unbind(), sums.unbind(), strict=True):
            torch._int_mm(own, self.coder.lookup_bytes(theirs, scratch).t(), out=to)
        first, second = sums.chunk(2, 1)
        torch.add(second, first, alpha=128, out=out)  # below 2^31 for rows of up to 1024
        if self.coder.bits == 8:
            out += (self.q.sum(-1, keepdim=True) * (self.coder.step / 2)).div_(self.unit)


def add_values(
    weights: Tensor, codes: Tensor, coder: Rows, sums: Tensor, scratch: Scratch, chosen: list[Tensor | slice] | None = None
) -> None:
    """Adds to ``sums fp32 [B x H, r, d]`` the levels of ``codes uint8 [B, H, n, bytes]`` times ``weights [B x H, r, n]``, of the
    ``chosen`` rows of each head alone where they are given."""
    codes = codes.flatten(0, 1)
    if chosen is not None:
        for own, theirs, to, rows in zip(weights, codes, sums, chosen, strict=True):
            if len(some := theirs[rows]):
                to += own[:, rows] @ coder.lookup(some)
        return
    pieces = _pieces(codes, coder)
    for own, theirs, to in zip(weights.chunk(pieces), codes.chunk(pieces), sums.chunk(pieces), strict=True):
        to.baddbmm_(own, coder.lookup(theirs, scratch))


def _pieces(codes: Tensor, coder: Rows) -> int:
    """In how many pieces the heads of all sequences are looked up."""
    return 1 if codes.device.type != "cpu" else -(-len(codes) // max(CHUNK // (codes.shape[1] * coder.d), 1))
