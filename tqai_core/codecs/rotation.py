"""Random rotations that make every coordinate look alike, rebuilt from a seed.

A power of two: randomised Hadamard transform, H diag(signs) / sqrt(d) (Ailon and Chazelle 2006; for quantisation QuIP#
2402.04396, TurboQuant 2504.19874). Other sizes up to 1024: a Haar-random orthogonal matrix by QR. Larger sizes: blocks
of the largest power of two that divides them. As one dense product; on CPUs :func:`hadamard` with a few butterflies around
a small one, which is faster.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DENSE = 1024
SMALL = 32  # side of the product inside ``hadamard``: below, the products no longer fill the machine


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


def hadamard(x: Tensor, small: Tensor, other: Tensor) -> Tensor:
    """``x @ (H kron small)`` for ``x [n, d]``, ``small [b, b]`` and the Sylvester-Hadamard ``H`` of d / b, in the memory of
    ``x`` and ``other``: returns the one that has the result, ``other`` for an even :func:`stages`."""
    n, width = len(x), len(small)
    torch.mm(x.view(-1, width), small, out=other.view(-1, width))
    return _butterflies(other, x, n, width, 1)


def hadamard_columns(x: Tensor, small: Tensor, out: Tensor, other: Tensor) -> Tensor:
    """The same, stored coordinate by coordinate: ``small [d / b, b, b]``, a matrix for each block of ``x [n, d]``; into
    ``out`` or ``other [d, n]``, ``out`` for an even :func:`stages`."""
    n, (blocks, width, _) = len(x), small.shape
    torch.bmm(small, x.view(n, blocks, width).permute(1, 2, 0), out=out.view(blocks, width, n))
    return _butterflies(out, other, 1, width, n)


def stages(d: int) -> int:
    """Butterflies around the small product."""
    return (d // SMALL).bit_length() - 1


def _butterflies(now: Tensor, free: Tensor, outer: int, width: int, inner: int) -> Tensor:
    end = now.numel() // outer
    span = width * inner
    while span < end:
        left, right = now.view(outer, -1, 2, span).unbind(2)
        to = free.view(outer, -1, 2, span)
        torch.add(left, right, out=to[:, :, 0])
        torch.sub(left, right, out=to[:, :, 1])
        now, free, span = free, now, span * 2
    return now
