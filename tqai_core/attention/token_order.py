"""The order of tokens in which block-sparse attention works: tile by tile over (frames, height, width).

A run of ``block`` tokens of a raster is a thin stripe; in tile order it is a cube, so that a block's mean says more about it
and its neighbourhood is compact. Attention does not ask for an order: tokens may stay laid out from the first layer to the
last, if the tables of the rotary embedding are laid out with them.
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
        """For ``n`` tokens, in tiles of about ``block``. What the grid does not explain is text; a grid that is too large is none."""
        rest = n - math.prod(grid) if grid else 0
        if rest < 0 or not grid:
            grid, rest = (n,), 0
        return TileOrder(tuple(grid), tile_shape(tuple(grid), block), *((rest, 0) if text_first else (0, rest)))

    def __len__(self) -> int:
        return math.prod(self.grid) + self.before + self.after

    @property
    def raster(self) -> bool:
        """Whether the order is the raster itself."""
        return _is_raster(self)

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
        """Where the tokens of the grid lie, in tile order: ``fp32 [tokens of the grid, axes]``."""
        axes = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in self.grid], indexing="ij")
        return TileOrder(self.grid, self.tile).apply(torch.stack([a.flatten() for a in axes], 1), 0)


def tile_shape(grid: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The tile of at most ``block`` tokens: as full as can be, dividing the grid if possible, and as near to a cube."""
    sizes = [range(1, min(size, block) + 1) for size in grid]

    def rank(tile: tuple[int, ...]) -> tuple[int, int, int]:
        ragged = sum(size % t > 0 for size, t in zip(grid, tile, strict=True))
        return -math.prod(tile), ragged, sum(tile)

    fits: list[tuple[int, ...]] = [()]
    for size in sizes:
        fits = [(*tile, t) for tile, t in itertools.product(fits, size) if math.prod(tile) * t <= block]
    return min(fits, key=rank)


@lru_cache(maxsize=32)
def _orders(layout: TileOrder, device: torch.device) -> tuple[Tensor, Tensor]:
    number = torch.zeros(layout.grid, dtype=torch.long)
    for axis, (size, t) in enumerate(zip(layout.grid, layout.tile, strict=True)):
        shape = [1] * len(layout.grid)
        shape[axis] = size
        number = number * -(-size // t) + (torch.arange(size) // t).view(shape)
    inner = number.flatten().argsort(stable=True) + layout.before
    order = torch.cat([torch.arange(layout.before), inner, torch.arange(len(layout) - layout.after, len(layout))])
    return order.to(device), order.argsort().to(device)


@lru_cache(maxsize=32)
def _is_raster(layout: TileOrder) -> bool:
    return torch.equal(_orders(layout, torch.device("cpu"))[0], torch.arange(len(layout)))


def local_index(layout: TileOrder, block_q: int, block_k: int, keep: int, device: torch.device) -> Tensor:
    """The ``keep`` nearest key blocks of every query block, ``int64 [1, 1, nq, keep]``, by the distance of their centres on the
    grid; blocks that hold text come first for everybody, and a block that holds text itself sees the blocks at its place."""
    return _local(layout, block_q, block_k, keep).to(device)


@lru_cache(maxsize=32)
def _local(layout: TileOrder, block_q: int, block_k: int, keep: int) -> Tensor:
    # distances in units of the grid, so that a frame is as far as a row or a column
    (cq, _), (ck, outside) = (_centres(layout, block) for block in (block_q, block_k))
    far = torch.cdist(cq, ck)
    far[:, outside] = -1.0
    return far.topk(min(keep, len(ck)), dim=1, largest=False).indices.sort(1).values[None, None]


def _centres(layout: TileOrder, block: int) -> tuple[Tensor, Tensor]:
    """Mean places of the blocks' tokens ``[blocks, axes]``, and which blocks hold text."""
    n, place = len(layout), layout.places()
    start = torch.arange(-(-n // block)) * block
    first, last = ((start + d - layout.before).clamp(0, len(place) - 1) for d in (0, block - 1))
    sums = torch.cat([place.new_zeros(1, place.shape[1]), place.double().cumsum(0)])
    mean = (sums[last + 1] - sums[first]) / (last + 1 - first)[:, None]
    return mean.float(), (start < layout.before) | ((start + block).clamp_max(n) > n - layout.after)


def neighbours(layout: TileOrder, radius: tuple[int, ...]) -> Tensor:
    """Tiles within ``radius`` tiles of each tile, ``int64 [1, 1, tiles, kept]``, for a grid that its tiles divide: moved inwards at the
    border, so that all tiles have as many. Raises ValueError where tiles are ragged or there is text."""
    counts = [size // t for size, t in zip(layout.grid, layout.tile, strict=True)]
    if (
        layout.before
        or layout.after
        or any(size % t for size, t in zip(layout.grid, layout.tile, strict=True))
        or len(radius) != len(counts)
    ):
        raise TqaiError(
            f"{layout} has no whole tiles in {len(radius)} directions: give a grid that its tile divides, no text, a radius an axis"
        )
    number = torch.zeros([1] * 2 * len(counts), dtype=torch.long)
    for axis, (count, r) in enumerate(zip(counts, radius, strict=True)):
        width = min(2 * r + 1, count)
        near = (torch.arange(count) - r).clamp(0, count - width)[:, None] + torch.arange(width)
        shape = [1] * 2 * len(counts)
        shape[axis], shape[axis + len(counts)] = count, width
        number = number * count + near.view(shape)
    return number.reshape(1, 1, math.prod(counts), -1)
