"""Block-sparse attention: every block of queries sees its own list of key blocks."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 22  # numbers of gathered keys and values at a time: bounds the extra memory


def block_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_q: int = 64, block_k: int = 64) -> Tensor:
    """Softmax attention of ``q [b, h, n, d]`` on the key blocks ``index [b or 1, h or 1, ceil(n / block_q), kept]`` of
    ``k, v [b, h, m, d]``. Returns ``[b, h, n, d]`` in the dtype of ``q``. A full index equals dense attention.

    Raises ValueError for shapes that do not fit and, on CPU, for blocks out of range.
    """
    b, h, n, d = q.shape
    m = k.shape[-2]
    nq, nk = -(-n // block_q), -(-m // block_k)
    if k.shape[:2] != (b, h) or v.shape[:3] != k.shape[:3] or k.shape[-1] != d:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be [b, h, tokens, d] with b, h, d alike")
    if index.ndim != 4 or index.shape[0] not in (1, b) or index.shape[1] not in (1, h) or index.shape[2] != nq:
        raise ValueError(f"index {tuple(index.shape)}: expected [{b} or 1, {h} or 1, {nq}, kept], key blocks for every {block_q} queries")
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < nk:
        raise ValueError(f"index names blocks {int(index.min())} to {int(index.max())}, there are 0 to {nk - 1} of {block_k} keys")
    kept = index.shape[-1]
    if n == 0 or kept == 0 or m == 0:
        return torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype, device=q.device)
    index = index.expand(b, h, nq, kept)
    ragged = m % block_k
    kb = F.pad(k, (0, 0, 0, -m % block_k)).unflatten(2, (nk, block_k)).flatten(0, 1)  # [bh, nk, block, d]
    vb = F.pad(v, (0, 0, 0, -m % block_k)).unflatten(2, (nk, block_k)).flatten(0, 1)
    qb = F.pad(q, (0, 0, 0, -n % block_q)).unflatten(2, (nq, block_q)).flatten(0, 1)
    flat = index.flatten(0, 1)
    rows = torch.arange(b * h, device=q.device)[:, None, None]
    out = torch.empty(b * h, nq, block_q, v.shape[-1], dtype=q.dtype, device=q.device)
    step = max(CHUNK // (b * h * kept * block_k * (d + v.shape[-1])), 1)
    for i in range(0, nq, step):
        part = flat[:, i : i + step]
        keys = kb[rows, part].flatten(2, 3)  # [bh, step, kept * block, d]
        values = vb[rows, part].flatten(2, 3)
        mask = None
        if ragged:
            live = torch.arange(block_k, device=q.device) < ragged
            mask = ((part != nk - 1)[..., None] | live).flatten(2)[:, :, None]
        out[:, i : i + step] = F.scaled_dot_product_attention(qb[:, i : i + step], keys, values, attn_mask=mask)
    return out.flatten(1, 2)[:, :n].unflatten(0, (b, h)).contiguous()


def local_index(n: int, block: int, keep: int, grid: tuple[int, ...], text: tuple[int, int], device: torch.device) -> Tensor:
    """The ``keep`` nearest key blocks of every block, ``int64 [1, 1, blocks, keep]``, by the distance of their centres on
    ``grid``; blocks that hold one of the ``text = (before, after)`` tokens outside the grid come first for everybody."""
    return _local(n, block, keep, tuple(grid), tuple(text)).to(device)


@lru_cache(maxsize=32)
def _local(n: int, block: int, keep: int, grid: tuple[int, ...], text: tuple[int, int]) -> Tensor:
    before, after = text
    if math.prod(grid) != n - before - after:
        grid, before, after = (n,), 0, 0
    blocks = -(-n // block)
    # distances in units of the grid, so that a frame is as far as a row or a column
    axes = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in grid], indexing="ij")
    place = torch.stack([a.flatten() for a in axes], 1)
    start = torch.arange(blocks) * block
    first, last = (start - before).clamp(0, len(place) - 1), (start + block - 1 - before).clamp(0, len(place) - 1)
    centre = torch.stack([place[a : b + 1].mean(0) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    far = torch.cdist(centre, centre)
    outside = (start < before) | (start + block > n - after)
    far[:, outside] = -1.0
    return far.topk(min(keep, blocks), dim=1, largest=False).indices.sort(1).values[None, None]
