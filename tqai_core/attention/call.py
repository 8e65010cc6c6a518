"""What is asked of the attention to one tier of rows, and the softmax that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codecs.rows import Scratch
from ..kv.segments import BitTier

LEAST = -1e30  # finite: a query that may see nothing keeps weight 0 instead of NaN


@dataclass
class OnlineSoftmax:
    """One softmax over keys that are seen a part at a time (Milakov and Gimelshein 1805.02867).

    The state after some parts, fp32: running maximum and weight ``[..., n, 1]`` and weighted sum of values ``[..., n, Dv]``."""

    top: Tensor
    weight: Tensor
    sum: Tensor

    @staticmethod
    def begin(q: Tensor, dv: int) -> OnlineSoftmax:
        """Before the first key, for queries ``q [..., n, D]``."""
        rows = q.shape[:-1]
        return OnlineSoftmax(q.new_full((*rows, 1), LEAST), q.new_zeros(*rows, 1), q.new_zeros(*rows, dv))

    def weigh(self, scores: Tensor) -> Tensor:
        """``scores [..., n, keys]`` (overwritten) -> their weights relative to the new maximum. The caller adds weights @ values to
        ``sum``."""
        self._raise(torch.maximum(self.top, scores.amax(-1, keepdim=True)))
        p = scores.sub_(self.top).exp_()
        self.weight = self.weight + p.sum(-1, keepdim=True)
        return p

    def merge(self, top: Tensor, weight: Tensor, sum: Tensor) -> OnlineSoftmax:
        """Join the states of other keys, stacked along a first dimension of parts."""
        self._raise(torch.maximum(self.top, top.amax(0)))
        share = torch.exp(top - self.top)
        self.weight = self.weight + (weight * share).sum(0)
        self.sum = self.sum + (sum * share).sum(0)
        return self

    def result(self) -> Tensor:
        return self.sum / self.weight.clamp_min(1e-30)

    def _raise(self, top: Tensor) -> None:
        """Express weight and sum relative to the maximum ``top``."""
        shrink = torch.exp(self.top - top)
        self.weight, self.sum, self.top = self.weight * shrink, self.sum.mul_(shrink), top


@dataclass(frozen=True)
class Mask:
    """Which tokens a block of queries sees: by a tensor, causal, or all where both are None."""

    given: Tensor | None = None  # broadcasts over [B, heads, queries, tokens]: bool (True = attend) or added
    causal: Tensor | None = None  # int64 [queries, 1]: the last position that each query sees
    first: int = 0  # tokens that the first query sees where it is causal; each further one sees one more

    @staticmethod
    def of(mask: Tensor | None, i: int, j: int, count: int, length: int, device: torch.device) -> Mask:
        """The rows ``i`` to ``j`` of the mask of ``count`` queries over ``length`` tokens; without one it is causal, aligned at the end."""
        if mask is not None:
            return Mask(mask[:, :, i:j] if mask.shape[2] > 1 else mask)
        if count == 1:
            return Mask()
        return Mask(None, torch.arange(length - count + i, length - count + j, device=device)[:, None], length - count + i + 1)

    def at(self, a: int, b: int) -> Tensor | None:
        """Columns of positions ``a`` to ``b``: ``[B or 1, heads or 1, queries, b - a]``, or None where all are seen."""
        if self.given is not None:
            return self.given[..., a:b]
        if self.causal is None:
            return None
        return (torch.arange(a, b, device=self.causal.device)[None] <= self.causal)[None, None]

    def exact(self, a: int, b: int, tier: BitTier) -> Tensor | None:
        """Columns of the exact rows ``a`` to ``b``, which lie on both sides of the packed ones."""
        if self.given is None and self.causal is None:
            return None
        front, gap = tier.sinks, tier.packed
        spans = ((a, min(b, front)), (max(a, front) + gap, b + gap))
        known = [part for start, end in spans if start < end and (part := self.at(start, end)) is not None]
        return known[0] if len(known) == 1 else torch.cat(known, dim=-1)

    def of_tier(self, tier: BitTier, sinks: int, packed: int) -> Mask:
        """The mask with its columns in the order of a tier: its exact rows lie on both sides of its packed ones, as ``sinks`` tokens and
        the rest do on both sides of all ``packed`` tokens of the cache."""
        if tier.order is None or (self.given is None and self.causal is None):
            return self
        last = tier.keys.shape[2] + packed
        ends = ((0, min(sinks, tier.keys.shape[2])), (min(sinks + packed, last), last))
        before, after = (torch.arange(a, b, device=tier.order.device).expand(len(tier.order), -1) for a, b in ends)
        columns = torch.cat([before, sinks + tier.order, after], 1)[:, None, None]  # [B, 1, 1, tokens of the tier]
        if self.causal is not None:
            return Mask(columns <= self.causal)
        assert self.given is not None
        b = max(self.given.shape[0], len(columns))
        return Mask(self.given.expand(b, -1, -1, -1).gather(3, columns.expand(b, *self.given.shape[1:3], -1)))


@dataclass(frozen=True)
class Call:
    """Queries of one block, and how they attend."""

    q: Tensor  # fp32 [B, H, group x count, D], scaled; a group is the query heads of a kv head
    count: int  # queries of a head
    mask: Mask = Mask()
    softcap: float | None = None  # tanh cap of the scores
    aux: Tensor | None = None  # [heads]: a logit that takes weight and has no value
    precise: bool = True  # products in fp32; else of 15 bits, which is within the rounding of bf16
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.count

    def begin(self, dv: int) -> OnlineSoftmax:
        """The softmax before the first key."""
        state = OnlineSoftmax.begin(self.q, dv)
        if self.aux is not None:
            b, h, r, _ = self.q.shape
            state.top = self.aux.float().view(1, h, self.group, 1, 1).expand(b, -1, -1, self.count, 1).reshape(b, h, r, 1).clone()
            state.weight = torch.ones_like(state.top)
        return state

    def capped(self, s: Tensor) -> Tensor:
        return s if self.softcap is None else (s / self.softcap).tanh_().mul_(self.softcap)

    def masked(self, s: Tensor, mask: Tensor | None) -> Tensor:
        """Scores ``[B, H, group x count, n]`` under some columns of the mask, in place."""
        if mask is not None:
            wide = s.view(*s.shape[:2], self.group, self.count, s.shape[-1])
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (s.shape[1], self.group))
            wide.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else wide.add_(mask)
        return s
