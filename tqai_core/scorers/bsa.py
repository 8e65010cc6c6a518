"""Which blocks of tokens carry the attention, by their centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..registry import Scorer, param
from ..types import Step

if TYPE_CHECKING:
    from ..kv_methods import Flush
    from ..memory import Stream


@dataclass(frozen=True)
class Bsa(Scorer, name="bsa", paper="block-centroid selection, as in BSA 2509.01085 and Quest 2406.10774"):
    """Attention mass between blocks estimated from their mean query and mean key: rank correlation .94 to .99 with the true
    mass on the minis, and the blocks it picks keep as much of it as the best ones (within .02). As a score of tokens, the
    mass their block receives. With the strategy ``window`` it chooses the blocks that stay exact; as a weight of the
    tolerance it changes nothing on the minis.
    At level kv finer rows for what the last queries look at gain next to nothing or lose (.95 to 1.9 of the KL of a plain cache
    of equal bytes); with ``window`` its blocks lose least of all scorers' (.87 of the nearest blocks' KL).
    """

    levels = (*Scorer.levels, "kv")
    queries = 4
    centroids = True

    block: int = param(16, "tokens a block", low=1, high=1024)

    def score(self, x: Tensor | None, step: Step, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        n, d = x.shape[1:]
        unit = F.normalize(x.float(), dim=-1) * d**0.5  # outputs have no scale of their own for a softmax
        mass = self.mass(unit[:, None], unit[:, None])[:, 0].mean(1)  # [b, blocks], what each block receives
        return (mass / mass.amax(-1, keepdim=True).clamp_min(1e-12)).repeat_interleave(self.block, 1)[:, :n]

    def weigh(self, flush: Flush) -> Tensor | None:
        """Level kv: what the recent queries give to a token's block, by its centroid, and in the block to the token. None where an
        attention hides its queries."""
        if flush.q is None:
            return None
        n, pad = flush.k.shape[2], -flush.k.shape[2] % self.block
        blocks = (flush.q @ centroids(flush.k, self.block).transpose(-1, -2)).softmax(-1).mean(2)  # [b, h, blocks]
        own = F.pad(flush.q @ flush.k.transpose(-1, -2), (0, pad), value=float("-inf")).unflatten(3, (-1, self.block)).softmax(-1).mean(2)
        score = (blocks[..., None] * own).flatten(2)[..., :n].mean(1)
        return score / score.amax(-1, keepdim=True).clamp_min(1e-30)

    def mass(self, q: Tensor, k: Tensor, block_q: int | None = None, block_k: int | None = None) -> Tensor:
        """Share of attention of every query block on every key block: ``q, k [b, h, n, d] -> fp32 [b, h, nq, nk]``."""
        cq, ck = centroids(q, block_q or self.block), centroids(k, block_k or self.block)
        return (cq @ ck.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def centroids(x: Tensor, block: int) -> Tensor:
    """Means of runs of ``block`` tokens, the last one as long as it is: ``[b, h, n, d] -> fp32 [b, h, ceil(n / block), d]``."""
    n = x.shape[-2]
    sums = F.pad(x.float(), (0, 0, 0, -n % block)).unflatten(-2, (-1, block)).sum(-2)
    sizes = sums.new_full((sums.shape[-2], 1), block)
    if n % block:
        sizes[-1] = n % block
    return sums / sizes
