"""The order of tokens in which block-sparse attention works: tile by tile over (frames, height, width).

A run of ``block`` tokens of a raster is a thin stripe; in tile order it is a cube, so that a block's mean represents it better
and its neighbourhood is compact. Attention does not depend on the order: tokens may stay in tile order from the first layer to
the last, if the tables of the rotary embedding are put in the same order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import TqaiError


@dataclass(frozen=True)
class TileOrder:
    """Tokens of a ``grid`` in tiles of ``tile``; ``before`` and ``after`` further tokens (text) keep their places."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    before: int = 0
    after: int = 0

    @staticmethod
    def of(n: int, block: int, grid: tuple[int, ...], text_first: bool = False) -> TileOrder:
        """For ``n`` tokens, in tiles of at most ``block``. Tokens beyond the grid are text; a grid of more than ``n`` is ignored."""
        rest = n - math.prod(grid) if grid else 0
        if rest < 0 or not grid:
            grid, rest = (n,), 0
        return TileOrder(tuple(grid), tile_shape(tuple(grid), block), *((rest, 0) if text_first else (0, rest)))

    def __len__(self) -> int:
        return math.prod(self.grid) + self.before + self.after

    @property
    def raster(self) -> bool:
        """Whether the order is the raster itself."""
        return _orders(self, torch.device("cpu"))[2]

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Raster order to tile order."""
        return x if self.raster else x.index_select(dim, _orders(self, x.device)[0])

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """Tile order to raster order."""
        return x if self.raster else x.index_select(dim, _orders(self, x.device)[1])

    def apply_rope(self, table: Tensor, dim: int = 0) -> Tensor:
        """A rotary table whose ``dim`` counts all tokens, or those of the grid alone."""
        size = table.shape[dim]
        if size == len(self):
            return self.apply(table, dim)
        if size == math.prod(self.grid):
            return TileOrder(self.grid, self.tile).apply(table, dim)
        raise TqaiError(
            f"rotary table {tuple(table.shape)}: dim {dim} should count {len(self)} tokens, or the {math.prod(self.grid)} of the grid"
        )

    def places(self) -> Tensor:
        """Coordinates of the tokens of the grid, in tile order: ``fp32 [tokens of the grid, axes]``."""
        axes = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in self.grid], indexing="ij")
        return TileOrder(self.grid, self.tile).apply(torch.stack([a.flatten() for a in axes], 1), 0)


def tile_shape(grid: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The largest tile of at most ``block`` tokens; of equal ones the one that divides the grid, then the one nearest to a cube."""
    sizes = [range(1, min(size, block) + 1) for size in grid]

    def rank(tile: tuple[int, ...]) -> tuple[int, int, int]:
        ragged = sum(size % t > 0 for size, t in zip(grid, tile, strict=True))
        return -math.prod(tile), ragged, sum(tile)

    fits: list[tuple[int, ...]] = [()]
    for size in sizes:
        fits = [(*tile, t) for tile, t in itertools.product(fits, size) if math.prod(tile) * t <= block]
    return min(fits, key=rank)


@lru_cache(maxsize=32)
def _orders(order: TileOrder, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Raster places in tile order, tile places in raster order, and whether the two orders are the same."""
    sides = list(zip(order.grid, order.tile, strict=True))
    tiles = torch.meshgrid(*[torch.arange(size) // t for size, t in sides], indexing="ij")
    number = torch.zeros(order.grid, dtype=torch.long)
    for (size, t), tile in zip(sides, tiles, strict=True):
        number = number * -(-size // t) + tile
    inner, n = number.flatten().argsort(stable=True) + order.before, len(order)
    forth = torch.cat([torch.arange(order.before), inner, torch.arange(n - order.after, n)])
    return forth.to(device), forth.argsort().to(device), torch.equal(forth, torch.arange(n))


@lru_cache(maxsize=32)
def local_index(order: TileOrder, block_q: int, block_k: int, num_blocks: int, device: torch.device) -> Tensor:
    """The nearest key blocks of every query block, ``int64 [1, 1, nq, num_blocks]``, by the distance of their centres on the
    grid. Blocks with text are the nearest to all; a query block with text takes the blocks nearest to its place."""
    # distances in units of the grid, so that a frame is as far as a row or a column
    (centre_q, _), (centre_k, text) = (_centres(order, block) for block in (block_q, block_k))
    distance = torch.cdist(centre_q, centre_k)
    distance[:, text] = -1.0
    return distance.topk(min(num_blocks, len(centre_k)), dim=1, largest=False).indices.sort(1).values[None, None].to(device)


def _centres(order: TileOrder, block: int) -> tuple[Tensor, Tensor]:
    """Mean coordinates of the blocks' tokens ``fp32 [blocks, axes]``, and which blocks hold text."""
    n, place = len(order), order.places()
    start = torch.arange(-(-n // block)) * block
    first, last = ((start + d - order.before).clamp(0, len(place) - 1) for d in (0, block - 1))
    sums = torch.cat([place.new_zeros(1, place.shape[1]), place.double().cumsum(0)])
    mean = (sums[last + 1] - sums[first]) / (last + 1 - first)[:, None]
    return mean.float(), (start < order.before) | ((start + block).clamp_max(n) > n - order.after)
