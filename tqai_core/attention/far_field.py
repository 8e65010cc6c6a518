"""The far field of block-sparse attention: the keys that a block of queries does not see enter its softmax as few pseudo-keys.

This costs a column or a hundredth of the keys, not a second pass over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..workspace import Workspace
from .blocks import Blocks
from .clusters import Clusters

FAR = ("centroid", "linear", "clusters")
GROUP = 1 << 21  # bytes of the keys of the heads that are processed together
SAMPLE = 512  # queries of a head that give the usual size of its queries


@dataclass(frozen=True)
class FarField:
    """Pseudo-keys for ``rows`` query blocks; the ``share`` query blocks of a head have them in common.

    ``key [rows / share, e, d]`` and ``value [rows / share, e, dv]`` enter the softmax with ``bias [rows, 1, e]`` (-inf: absent) added to
    their logits; ``moments`` give the change of the value with each query.
    Centroid form, one pseudo-key for each of e blocks: ``moments [rows / share, d, dv]`` of keys and values around the means of their
    blocks, averaged over all blocks of a head. ``bias`` includes the second order: the variance of the keys along a query of usual size.
    Clusters: the centroid form, where some key blocks enter by the means of their clusters: ``bias`` has the columns of these, ``near``,
    before the e others.
    Linear form, e = 1: ``moments [rows, d, dv + d]`` of far keys with far values and with far keys around a common centre, from which
    ``mean [rows, 1, dv + d]`` leads to their own means. The variance of the far keys along each query increases their weight.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    moments: Tensor
    share: int = 1
    mean: Tensor | None = None
    near: Clusters | None = None

    @property
    def finer(self) -> int:  # how many of the pseudo-keys are means of clusters
        return self.bias.shape[2] - self.key.shape[1]

    def fill(self, k: Tensor, v: Tensor, i: int, j: int) -> None:
        """Writes the pseudo-keys of the query blocks i to j to ``k [j - i, columns of bias, d]`` and ``v``."""
        if self.near is not None:
            self.near.fill(k[:, : self.finer], v[:, : self.finer], i, j)
        k[:, self.finer :], v[:, self.finer :] = self.heads(self.key, i, j), self.heads(self.value, i, j)

    def heads(self, x: Tensor, i: int, j: int) -> Tensor:
        """``x`` (key, value or moments) of the query blocks i to j."""
        if i // self.share == (j - 1) // self.share:
            return x[i // self.share, None]
        return x[torch.arange(i, j, device=x.device) // self.share]

    def change(self, q: Tensor, i: int, j: int) -> Tensor:
        """``q [j - i, block, d]`` times the moments of the query blocks i to j."""
        if self.mean is None:
            own = self.heads(self.moments, i, j)
            return torch.bmm(q, own) if len(own) > 1 else (q.flatten(0, 1) @ own[0]).view(*q.shape[:2], -1)
        mean = self.mean[i:j]
        return torch.bmm(q, self.moments[i:j]).baddbmm_(torch.bmm(q, mean[..., -q.shape[-1] :].mT), mean, alpha=-1)


def far_field(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, far: Tensor, blocks: Blocks, form: str, space: Workspace
) -> FarField:  # fmt: skip
    """The far field of the heads ``q [g, n, d]``, ``k [g, m, d]``, ``v [g, m, dv]`` for query blocks that do not see the key blocks which
    ``far fp32 [g, nq, nk]`` marks with 1. O(m d (d + dv)) operations; the linear form holds d (d + dv) numbers for each query block."""
    block = blocks.block_k
    pad, nk = -k.shape[1] % block, far.shape[2]
    live = torch.ones(1, k.shape[1], device=k.device, dtype=torch.bool) if keys is None else keys
    live = F.pad(live, (0, pad)).unflatten(1, (nk, block)).unsqueeze(3)  # [g or 1, nk, block, 1]
    hidden = ~live if pad or keys is not None else None
    kb, vb = (padded(x, block).unflatten(1, (nk, block)) for x in (k, v))
    if form == "linear":
        return _linear(kb, vb, live, hidden, far, space)
    return _centroids(q, kb, vb, live, hidden, far, space, blocks.block_q if form == "clusters" else 0)


def _centroids(
    q: Tensor, kb: Tensor, vb: Tensor, live: Tensor, hidden: Tensor | None, far: Tensor, space: Workspace, block_q: int
) -> FarField:  # fmt: skip
    """``block_q``: of the form of clusters, else 0."""
    (g, nk, block, d), dv, dtype, room = kb.shape, vb.shape[3], kb.dtype, kb.shape[1] * kb.shape[2]
    count = live.sum(2).float()  # [g or 1, nk, 1]
    bias = torch.where((far > 0) & (count > 0).mT, count.log().mT, -math.inf)  # [g, nq, nk]
    key, value = ((_sum(_visible(x, hidden).flatten(0, 1)).view(g, nk, -1) / count.clamp_min(1)).to(dtype) for x in (kb, vb))
    moments, spread = space.take("moments", (g, d, dv)).zero_(), far.new_zeros(g, 1, d)
    near = Clusters(kb, vb) if block_q else None
    step = max(GROUP // (g * block * d * kb.element_size()), 1)
    for i in range(0, nk, step):
        j = min(i + step, nk)
        own = torch.sub(kb[:, i:j], key[:, i:j, None], out=space.take("both", (g, j - i, block, d)))
        if hidden is not None:
            own.masked_fill_(hidden[:, i:j], 0)
        if near is not None:
            near.add(i, j, own, vb[:, i:j], live[:, i:j])
        own = own.flatten(1, 2)
        moments.baddbmm_(own.mT, vb[:, i:j].flatten(1, 2), alpha=1 / room)  # a mean, which half precision can hold
        spread += _sum(own.square_())
    total = count.sum(1, keepdim=True).clamp_min(1)  # [g or 1, 1, 1]
    if hidden is not None:
        moments.mul_(room / total)
    few = q[:, :: -(-q.shape[1] // SAMPLE)]
    usual = _sum(few.square()).mT / (few.shape[1] * 2 * d)  # [g, d, 1]; by the spread: half the variance of logits
    spread, fine = spread / total, far[..., :0]
    if near is not None:
        sums = _sum(padded(q, block_q).reshape(-1, block_q, d)).view(g, -1, d)
        sizes = (q.shape[1] - torch.arange(sums.shape[1], device=q.device) * block_q).clamp_max(block_q)
        fine = near.finish(sums / sizes[:, None], key, bias, spread, usual)
    bias = torch.cat([fine, bias.add_((spread @ usual).log1p_())], 2)
    return FarField(key, value, bias.flatten(0, 1)[:, None], moments, share=far.shape[1], near=near)


def _linear(kb: Tensor, vb: Tensor, live: Tensor, hidden: Tensor | None, far: Tensor, space: Workspace) -> FarField:
    (g, nk, block, d), nq, dv, dtype = kb.shape, far.shape[1], vb.shape[3], kb.dtype
    count = live.sum(2).float()
    # a first centre, so that the differences below keep their digits; a sum in half precision would be made in a wide copy
    even = (live.flatten(1, 2) / count.sum(1, keepdim=True).clamp_min(1)).to(dtype).mT.expand(g, 1, -1)
    km, vm = (torch.bmm(even, _visible(x, hidden).flatten(1, 2)) for x in (kb, vb))  # [g, 1, d]
    n = far @ count  # [g, nq, 1]
    marks = (far / n.clamp_min(1)).to(dtype)
    moments = space.take("moments", (g, nq, d * (dv + d))).zero_()
    mean = far.new_zeros(g, nq, dv + d)
    step = max(GROUP // (g * d * (dv + d) * kb.element_size()), 1)
    for i in range(0, nk, step):
        j = min(i + step, nk)
        both = space.take("both", (g, j - i, block, dv + d))
        torch.sub(vb[:, i:j], vm[:, :, None], out=both[..., :dv])
        torch.sub(kb[:, i:j], km[:, :, None], out=both[..., dv:])
        if hidden is not None:
            both.masked_fill_(hidden[:, i:j], 0)
        rows = both.flatten(0, 1)
        own = torch.bmm(rows[..., dv:].mT, rows, out=space.take("own", (len(rows), d, dv + d)))  # of each block
        mean += (far[..., i:j] / n.clamp_min(1)) @ _sum(rows).view(g, j - i, -1)
        moments.baddbmm_(marks[..., i:j], own.view(g, j - i, -1))
    mean = mean.flatten(0, 1)[:, None]
    key, value = ((c.float().repeat_interleave(nq, 0) + x).to(dtype) for c, x in ((km, mean[..., dv:]), (vm, mean[..., :dv])))
    return FarField(key, value, n.log().flatten(0, 1)[:, None], moments.view(g * nq, d, dv + d), mean=mean.to(dtype))


def padded(x: Tensor, block: int) -> Tensor:
    """``[g, m, d]`` with zeros up to whole blocks; no copy where there are none."""
    pad = -x.shape[1] % block
    return F.pad(x, (0, 0, 0, pad)) if pad else x


def _visible(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x if hidden is None else x.masked_fill(hidden, 0)


def _sum(x: Tensor) -> Tensor:
    """``[g, m, d] -> fp32 [g, 1, d]``, as a product: a sum of half precision would be made in a wide copy, or overflow."""
    unit = 0.5 ** (x.shape[1] - 1).bit_length()
    return torch.bmm(x.new_full((1, 1, 1), unit).expand(len(x), 1, x.shape[1]), x).float() / unit
