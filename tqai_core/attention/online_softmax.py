"""One softmax over keys that are seen a part at a time (Milakov and Gimelshein 1805.02867)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = -1e30  # finite: a query that may see nothing keeps weight 0 instead of NaN


@dataclass
class OnlineSoftmax:
    """The state after some parts, fp32: running maximum and weight ``[..., n, 1]`` and weighted sum of values ``[..., n, Dv]``."""

    top: Tensor
    weight: Tensor
    sum: Tensor

    @staticmethod
    def begin(q: Tensor, dv: int, aux: Tensor | None = None) -> OnlineSoftmax:
        """Before the first key, for queries ``q [..., n, D]``. ``aux [..., n, 1]``: a logit that takes weight and has no value."""
        empty = q.new_zeros(*q.shape[:-1], dv)
        if aux is None:
            return OnlineSoftmax(q.new_full((*q.shape[:-1], 1), LEAST), q.new_zeros(*q.shape[:-1], 1), empty)
        return OnlineSoftmax(aux, torch.ones_like(aux), empty)

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
