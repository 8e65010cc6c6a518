"""Random rotations that make every coordinate look alike, rebuilt from a seed.

A power of two: randomised Hadamard transform, H diag(signs) / sqrt(d) (Ailon and Chazelle 2006; for quantisation QuIP#
2402.04396, TurboQuant 2504.19874). Other sizes up to 1024: a Haar-random orthogonal matrix by QR. Larger sizes: blocks
of the largest power of two that divides them. As one dense product: on CPUs faster than a butterfly in eager mode.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DENSE = 1024


def block_size(d: int) -> int:
    """The size of the square matrix that rotates vectors of ``d``: ``d`` itself, or the block it is cut into."""
    if d <= DENSE:
        return d
    power = d & -d
    return min(power, DENSE) if power >= 16 else d


@lru_cache(maxsize=32)
def matrix(d: int, seed: int) -> Tensor:
    """Orthogonal ``fp32 [d, d]``; rows are the new axes: ``rotated = x @ matrix.T``."""
    g = torch.Generator().manual_seed(seed)
    if d & (d - 1) == 0:
        h = torch.ones(1, 1)
        while len(h) < d:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        signs = torch.randint(0, 2, (d,), generator=g) * 2.0 - 1
        return (h * signs / d**0.5).contiguous()
    q, r = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    return (q * r.diagonal().sign()).T.float().contiguous()


def rotate(x: Tensor, m: Tensor) -> Tensor:
    """``x [n, d]`` into the rotated domain."""
    b = len(m)
    return x @ m.T if x.shape[-1] == b else (x.reshape(-1, b) @ m.T).view(x.shape)


def unrotate(x: Tensor, m: Tensor) -> Tensor:
    """``x [n, d]`` back; the inverse of an orthogonal matrix is its transpose."""
    b = len(m)
    return x @ m if x.shape[-1] == b else (x.reshape(-1, b) @ m).view(x.shape)
