"""Clusters of keys: finer pseudo-keys for the key blocks that come next after those that are read.

Where attention is spread, a query gives a block that is not read a little of its weight, and to few keys of it. Keys of unusual
direction or size take most of that, and so each becomes the seed of a cluster; clusters of equal size would average them away.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEYS = 4  # of a block to each of its clusters
SHARE = 6  # one of so many key blocks enters by its clusters


class Clusters:
    """The clusters of the key blocks ``kb [g, nk, block, d]`` with values ``vb``: their means and how many keys each has."""

    def __init__(self, kb: Tensor, vb: Tensor) -> None:
        size = (*kb.shape[:2], -(-kb.shape[2] // KEYS))
        self.key, self.value = kb.new_empty(*size, kb.shape[3]), vb.new_empty(*size, vb.shape[3])
        self.count = kb.new_empty(size, dtype=torch.float32)
        self.index: Tensor  # int64 [g nq, few]: the blocks of g x nk whose clusters each query block sees

    def add(self, i: int, j: int, own: Tensor, v: Tensor, live: Tensor) -> None:
        """Those of the blocks i to j: ``own [g, j - i, block, d]`` are keys minus their mean, ``live bool [g or 1, j - i, block, 1]``."""
        live = live.expand(len(own), -1, -1, -1).mT  # [g, j - i, 1, block]
        nearest = seeds(own.flatten(0, 1), live.reshape(-1, live.shape[3]), self.key.shape[2]).view_as(live)
        member = (nearest == torch.arange(self.key.shape[2], device=own.device)[:, None]) & live
        torch.sum(member, 3, dtype=torch.float32, out=self.count[:, i:j])
        share = member.to(own.dtype).div_(self.count[:, i:j, :, None].clamp(min=1))  # before the sum, which half precision may not hold
        self.key[:, i:j], self.value[:, i:j] = share @ own, share @ v

    def finish(self, mean: Tensor, key: Tensor, bias: Tensor, spread: Tensor, usual: Tensor) -> Tensor:
        """The bias of the clusters that each query block sees, ``fp32 [g, nq, few c]``: ``bias [g, nq, nk]`` loses their blocks, those
        that its ``mean fp32 [g, nq, d]`` attends to most. ``key [g, nk, d]`` are the means of the key blocks, ``spread fp32 [g, 1, d]``
        their variance, of which the clusters keep a part; ``usual [g, d, 1]`` turns it into half a variance of logits."""
        (g, nq, nk), d = bias.shape, key.shape[2]
        best = torch.baddbmm(bias, mean, key.float().mT, alpha=d**-0.5).topk(-(-nk // SHARE))
        bias.scatter_(2, best.indices, -torch.inf)
        part = (self.count / self.count.sum((1, 2), keepdim=True).clamp(min=1)).to(key.dtype).view(g, 1, -1)
        inside = (spread - (part @ self.key.square().flatten(1, 2)).float()).clamp(min=0)
        self.index = (best.indices + torch.arange(g, device=key.device)[:, None, None] * nk).flatten(0, 1)
        own = self.count.log().flatten(0, 1)[self.index].view(g, nq, -1, self.count.shape[2])
        self.key += key[:, :, None]
        return own.masked_fill_(best.values.isneginf()[..., None], -torch.inf).flatten(2) + (inside @ usual).log1p_()

    def fill(self, k: Tensor, v: Tensor, i: int, j: int) -> None:
        """Writes those of the query blocks i to j to ``k [j - i, few c, d]``, ``v [j - i, few c, dv]``."""
        for table, out in ((self.key, k), (self.value, v)):
            for at, row in zip(self.index[i:j], out, strict=True):
                torch.index_select(table.view(table.shape[0] * table.shape[1], -1), 0, at, out=row.view(len(at), -1))


def seeds(own: Tensor, live: Tensor, count: int) -> Tensor:
    """``int64 [blocks, n]``: the number of the seed that is nearest to each of the keys ``own [blocks, n, d]`` minus their mean. The
    first of ``count`` seeds is the key farthest from the mean, each other one that farthest from those before it (Gonzalez 1985), out
    of the keys ``live bool [blocks, n]``."""
    blocks, n, _ = own.shape
    gram = torch.bmm(own, own.mT)
    size, rows = gram.diagonal(dim1=1, dim2=2).float(), gram.flatten(0, 1)
    first = torch.arange(blocks, device=own.device) * n
    seed, nearest = size.argmax(1), torch.zeros(blocks, n, dtype=torch.long, device=own.device)
    distance = torch.where(live, torch.inf, -1.0)
    for i in range(count):
        here = rows.index_select(0, first + seed).float().mul_(-2).add_(size).add_(size.gather(1, seed[:, None]))
        nearest.masked_fill_(here < distance, i)
        seed = torch.minimum(distance, here, out=distance).argmax(1)
    return nearest
