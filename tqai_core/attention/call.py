"""What is asked of the attention to one tier of rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..codecs.rows import Scratch
from ..kv.segments import BitTier
from .online_softmax import OnlineSoftmax


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
            return replace(self, given=columns <= self.causal, causal=None, first=0)
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
        if self.aux is None:
            return OnlineSoftmax.begin(self.q, dv)
        b, h, r, _ = self.q.shape
        aux = self.aux.float().view(1, h, self.group, 1, 1).expand(b, -1, -1, self.count, 1).reshape(b, h, r, 1).clone()
        return OnlineSoftmax.begin(self.q, dv, aux)

    def capped(self, s: Tensor) -> Tensor:
        return s if self.softcap is None else (s / self.softcap).tanh_().mul_(self.softcap)

    def masked(self, s: Tensor, mask: Tensor | None) -> Tensor:
        """Scores ``[B, H, group x count, n]`` under some columns of the mask, in place."""
        if mask is not None:
            wide = s.view(*s.shape[:2], self.group, self.count, s.shape[-1])
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (s.shape[1], self.group))
            wide.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else wide.add_(mask)
        return s
