"""The scalar quantiser of ``turbo``: each coordinate takes the nearest Lloyd-Max level, by one table lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..workspace import Workspace
from . import packing
from .levels import Grid, lloyd_max

# codes a lookup unit: the decoder reads a whole unit by one gather
UNIT = {1: 8, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}


def run_bytes(d: int, bits: int) -> int:
    """Bytes of a run of ``d`` codes: whole units."""
    return packing.row_bytes(-(-d // UNIT[bits]), UNIT[bits] * bits)


class Scalar:
    """Tables of one width for coordinates of unit variance of a random rotation of R^d (d None: Gaussian)."""

    chunk = 1 << 18  # coordinates at a time: a MiB of fp32 hides the calls and stays in the cache between passes
    columns = False  # reads vectors as rows

    def __init__(self, bits: int, d: int | None, device: torch.device) -> None:
        self.bits, self.per = bits, UNIT[bits]
        level = lloyd_max(bits, d)
        border = (level[1:] + level[:-1]) / 2
        # borders of up to four symmetric levels are equally far apart: the cell is the code
        self.even = bits <= 2
        self.grid = Grid(2**bits, max(2 * float(border[-1]), 1.0)) if self.even else Grid.over(level, 2 ** max(11, bits + 6))
        self.code = torch.bucketize(self.grid.centre, border).to(torch.uint8).to(device)
        unit = torch.arange(2 ** (bits * self.per))[:, None] >> torch.arange(0, bits * self.per, bits)
        self.table = level[unit & (2**bits - 1)].contiguous().to(device)

    def encode(self, y: Tensor, inverse: Tensor, weight: Tensor | None, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """``y fp32 [n, d]`` (overwritten) and ``inverse [n, 1]`` that brings it to unit variance.

        Returns bytes ``uint8 [n, bytes]`` and the weighted sums <y, q> and <q, q> with the levels chosen, ``fp32 [n]``.
        """
        cells = self.grid.cells(y, inverse, work)
        codes = work.take("codes", y.shape, torch.uint8)
        if self.even:
            codes.copy_(cells)
        else:
            torch.index_select(self.code, 0, cells.view(-1), out=codes.view(-1))
        if y.shape[1] % self.per:
            codes = F.pad(codes, (0, -y.shape[1] % self.per))
        packed = packing.pack(codes, self.bits)
        q = self.decode(packed, y.shape[1], work)
        if weight is None:
            return packed, y.mul_(q).sum(-1), torch.linalg.vector_norm(q, dim=-1).square_()
        return packed, y.mul_(q) @ weight, q.mul_(q) @ weight

    def decode(self, packed: Tensor, d: int, work: Workspace) -> Tensor:
        """``uint8 [n, bytes] -> fp32 [n, d]``: unpacks and dequantises at once; lives in ``work``."""
        if 8 % self.bits == 0:
            units = work.take("units", packed.shape, torch.int32).copy_(packed)
        else:
            units = packing.unpack(packed, -(-d // self.per), self.bits * self.per)
        out = packing.lookup(self.table, units, work)
        return out if out.shape[1] == d else out[:, :d]


_MADE: dict[tuple[int, int | None, str], Scalar] = {}  # a plain dict: torch.compile reads it, but not a cache


def scalar(bits: int, d: int | None, device: torch.device) -> Scalar:
    """The tables of a width, made once."""
    key = (bits, d, str(device))
    if key not in _MADE:
        _MADE[key] = Scalar(bits, d, device)
    return _MADE[key]
