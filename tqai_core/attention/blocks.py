"""Which blocks of keys each block of queries sees: the index of block-sparse attention, checked and sorted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TqaiError

ALL = slice(None)


@dataclass(frozen=True)
class Blocks:
    """``index int64 [b, h, nq, num_blocks]`` is sorted; where ``live`` (same shape) is False the entry repeats another one and does
    not count. ``keys`` bool ``[b, m]`` is True for keys that may be seen. ``nk`` is the number of key blocks."""

    index: Tensor
    live: Tensor | None
    keys: Tensor | None
    block_q: int
    block_k: int
    nk: int

    @staticmethod
    def of(q: Tensor, k: Tensor, index: Tensor, block_q: int, block_k: int, keys: Tensor | None) -> Blocks:
        b, h, nk = q.shape[0], q.shape[1], -(-k.shape[2] // block_k)
        on_host = index.device.type == "cpu"  # elsewhere a look at the values would make the host wait
        if index.dtype == torch.bool:
            counts = index.sum(-1, keepdim=True)
            index = (~index).to(torch.uint8).argsort(dim=-1, stable=True)[..., : max(int(counts.max()), 1) if on_host else nk]
            live = torch.arange(index.shape[-1], device=index.device) < counts
        else:
            index = index.long().sort(-1).values
            live = torch.ones_like(index, dtype=torch.bool)
            live[..., 1:] = index[..., 1:] != index[..., :-1]
        index, live = (x.expand(b, h, -1, -1) for x in (index, live))
        every = on_host and bool(live.all())
        return Blocks(index, None if every else live, None if keys is None else keys.expand(b, -1), block_q, block_k, nk)

    def heads(self, batch: slice, heads: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Index, live and keys of some heads, batch and heads as one dimension."""
        index, live = self.index[batch, heads], None if self.live is None else self.live[batch, heads].flatten(0, 1)
        keys = None if self.keys is None else self.keys[batch].repeat_interleave(index.shape[1], 0)
        return index.flatten(0, 1), live, keys

    def unselected(self, batch: slice = ALL, heads: slice = ALL) -> Tensor:
        """1 where a key block is not selected, ``fp32 [batch x heads, nq, nk]``."""
        index, live, _ = self.heads(batch, heads)
        marks = torch.zeros(*index.shape[:2], self.nk, device=index.device)
        ones = torch.ones_like(index, dtype=torch.float32) if live is None else live.float()
        return 1 - marks.scatter_reduce_(2, index, ones, "amax")


def check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_q: int, block_k: int, keys: Tensor | None) -> None:
    """TqaiError for shapes, types and block numbers that do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[-1] != q.shape[-1]:
        raise TqaiError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be [b, h, tokens, d] with b, h, d alike")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise TqaiError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give three of one floating type")
    if block_q < 1 or block_k < 1:
        raise TqaiError(f"block_q={block_q}, block_k={block_k}: give numbers of tokens, 1 or more")
    (b, h, n, _), m, marks = q.shape, k.shape[2], index.dtype == torch.bool
    nq, nk = -(-n // block_q), -(-m // block_k)
    fits = index.ndim == 4 and index.shape[0] in (1, b) and index.shape[1] in (1, h) and index.shape[2] == nq
    if not fits or (marks and index.shape[3] != nk):
        raise TqaiError(
            f"index {tuple(index.shape)}: expected [{b} or 1, {h} or 1, {nq}, {nk if marks else 'num_blocks'}], "
            f"key blocks of {block_k} for every {block_q} queries"
        )
    if index.is_floating_point() or index.is_complex():
        raise TqaiError(f"index is {index.dtype}: give numbers of blocks as integers, or a bool mark for each block")
    if keys is not None and (keys.dtype != torch.bool or keys.ndim != 2 or keys.shape[0] not in (1, b) or keys.shape[1] != m):
        raise TqaiError(f"keys is {keys.dtype} {tuple(keys.shape)}: expected bool [{b} or 1, {m}], True for keys that may be seen")
    if marks or index.numel() == 0:
        return
    low, high = index.aminmax()
    if index.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < nk), f"index names blocks that are not there: 0 to {nk - 1} of {block_k} keys")
    elif int(low) < 0 or int(high) >= nk:
        raise TqaiError(f"index names blocks {int(low)} to {int(high)}, there are 0 to {nk - 1} of {block_k} keys")


def block_means(x: Tensor, block: int) -> Tensor:
    """Means of runs of ``block`` tokens, of what is left in the last run: ``[b, h, n, d] -> fp32 [b, h, ceil(n / block), d]``."""
    n = x.shape[-2]
    sums = F.pad(x, (0, 0, 0, -n % block)).unflatten(-2, (-1, block)).sum(-2, dtype=torch.float32)
    sizes = sums.new_full((sums.shape[-2], 1), block)
    if n % block:
        sizes[-1] = n % block
    return sums / sizes
