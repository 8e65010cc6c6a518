"""Lloyd-Max levels of one coordinate of a random rotation, for any width and any dimension.

A coordinate of a uniformly random direction in R^d, scaled by sqrt(d), has density ~ (1 - t^2/d)^((d-3)/2) on
[-sqrt(d), sqrt(d)] (Gaussian for large d). Lloyd (1982) and Max (1960): levels are the means of their cells, borders
the midpoints of the levels; iterated here until nothing moves.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import TqaiError
from ..workspace import Workspace

REACH = 8.0  # standard deviations; beyond lies 1e-15 of a Gaussian
GRID = 1 << 17


class Grid:
    """Equal cells over the reach of some levels. A number's cell is a multiply-add away, so whatever depends on the
    nearest level is one table lookup; a search among the levels is much slower."""

    def __init__(self, cells: int, reach: float) -> None:
        self.scale, self.middle, self.last = cells / (2 * reach), cells / 2, cells - 1
        self.centre = (torch.arange(cells) + 0.5) / self.scale - reach

    @staticmethod
    def over(level: Tensor, cells: int, least: float = 0.0) -> Grid:
        return Grid(cells, max(float(level[-1]) * 1.05 + 0.1, least))

    def cells(self, y: Tensor, inverse: Tensor, work: Workspace) -> Tensor:
        """Cells ``int32`` of ``y * inverse``, in ``work`` under "scaled"; what lies outside takes the first or the last."""
        scaled = torch.mul(y, inverse * self.scale, out=work.take("scaled", y.shape)).add_(self.middle).clamp_(0, self.last)
        if torch.compiler.is_compiling():
            return scaled.to(torch.int32)
        return scaled.view(torch.int32).copy_(scaled)  # each number over itself: fresh memory would cost more


@lru_cache(maxsize=128)
def lloyd_max(bits: int, d: int | None = None) -> Tensor:
    """Levels ``fp32 [2 ** bits]``, ascending and symmetric, for unit-variance coordinates of dimension ``d``."""
    if not 1 <= bits <= 8:
        raise TqaiError(f"bits={bits} asked; levels exist for 1 to 8 bits")
    t, p = _density(d)
    mass = np.concatenate([[0.0], np.cumsum(p)])
    first = np.concatenate([[0.0], np.cumsum(p * t)])
    edge = np.concatenate([t - (t[1] - t[0]) / 2, [t[-1] + (t[1] - t[0]) / 2]])
    # start where an optimal quantiser has its levels at high rate: density^(1/3) (Panter and Dite)
    third = np.cumsum(p ** (1 / 3))
    level = np.interp((np.arange(2**bits) + 0.5) / 2**bits, third / third[-1], t)
    inner = np.arange(2**bits - 1)
    for _ in range(100):  # Newton on level - centroid(level) = 0, whose Jacobian is tridiagonal; about ten steps
        border = np.concatenate([[edge[0]], (level[1:] + level[:-1]) / 2, [edge[-1]]])
        m = np.maximum(np.diff(np.interp(border, edge, mass)), 1e-300)
        centroid = np.diff(np.interp(border, edge, first)) / m
        at = np.interp(border[1:-1], t, p / (t[1] - t[0]))
        up = at * (border[1:-1] - centroid[:-1]) / (2 * m[:-1])  # how far a border pulls the centroid on its left
        down = at * (centroid[1:] - border[1:-1]) / (2 * m[1:])
        jacobian = np.eye(2**bits)
        jacobian[inner, inner] -= up
        jacobian[inner + 1, inner + 1] -= down
        jacobian[inner, inner + 1] -= up
        jacobian[inner + 1, inner] -= down
        move = np.linalg.solve(jacobian, centroid - level)
        new = level + move
        if not (np.diff(new) > 0).all():  # too far for Newton: one plain Lloyd step
            new = centroid
        moved, level = np.abs(new - level).max(), new
        if moved < 1e-10:
            break
    return torch.tensor((level - level[::-1]) / 2, dtype=torch.float32)


@lru_cache(maxsize=8)
def _density(d: int | None) -> tuple[np.ndarray, np.ndarray]:
    # d = 1 and 2 put all their mass at the rim; three dimensions are uniform and serve them well, since the gain is refitted
    d = None if d is None or d > 512 else max(d, 3)
    reach = REACH if d is None else min(REACH, d**0.5)
    edges = np.linspace(-reach, reach, GRID + 1)
    t = (edges[1:] + edges[:-1]) / 2
    p = np.exp(-t * t / 2) if d is None else np.maximum(1 - t * t / d, 0.0) ** ((d - 3) / 2)
    p /= p.sum()
    return t / np.sqrt((p * t * t).sum()), p
