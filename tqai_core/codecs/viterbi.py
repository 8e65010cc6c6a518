"""Four-state trellis-coded quantisation (Marcellin and Fischer 1990; Ungerboeck 1982), batched in plain torch.

With ``b`` bits there are 2^(b+1) sorted levels in four interleaved subsets, label = index mod 4. A coordinate's code is
u (one bit, chooses the subset together with the two u before it) and m (b - 1 bits, the place in the subset):

    label_t = 2 (u_t xor u_{t-2}) + u_{t-1},     index_t = 4 m_t + label_t,     u_{-1} = u_{-2} = 0

so that the decoder needs the code and two bits of its neighbours only: it is parallel over all coordinates.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import read_json
from ..workspace import Workspace
from . import packing
from .levels import Grid
from .scalar import UNIT

BLOCK = 8  # coordinates whose branch metrics are in memory at a time, and between two renormalisations
CENTRAL, MOST, FAR = 100, 2500, 9000  # int16 cost of the worst label amid the levels, of any label, of a state that cannot be
LEVELS = Path(__file__).with_name("trellis_levels.json")  # positive halves, by benchmarks/trellis_levels.py


@lru_cache(maxsize=8)
def trellis_levels(bits: int) -> Tensor:
    """The ``2 ** (bits + 1)`` levels, ascending and symmetric, trained for a Gaussian of unit variance."""
    half = torch.tensor(read_json(LEVELS, what="table of levels", again="install tqai-core again")[str(bits)], dtype=torch.float32)
    return torch.cat([-half.flip(0), half])


class Trellis4:
    """Tables of one width."""

    chunk = 1 << 18  # coordinates at a time: enough vectors a step of the trellis to hide its many small operations
    columns = True  # a step of the trellis is a column of the vectors

    def __init__(self, bits: int, level: Tensor, device: torch.device) -> None:
        self.bits, self.per, self.device = bits, UNIT[bits], device
        self.grid = Grid.over(level, 2 ** max(11, bits + 8), least=5.0)
        # four consecutive levels hold the nearest one of every label; the window starts at ``first``
        first = torch.bucketize(self.grid.centre, (level[:-4] + level[4:]) / 2)
        label = torch.arange(4)
        index = first[:, None] + ((label - first[:, None]) & 3)
        near = level[index]  # [cells, 4]
        # what a label costs beyond the cheapest; only differences decide. int16 halves the traffic of the search
        cost = (near - self.grid.centre[:, None]).square()
        cost = cost - cost.amin(1, keepdim=True)
        unit = float(cost[len(cost) // 2].max()) / CENTRAL if bits > 2 else float(cost.max()) / MOST
        self.cost = (cost / unit).round().clamp_(max=MOST).to(torch.int16).T.contiguous().to(device)  # [4, cells]
        self.place = (index >> 2).to(torch.uint8).view(-1).to(device)  # [cells * 4]
        self.near = near.reshape(-1).to(device)  # [cells * 4]
        self.table = self._table(level).to(device)

    def _table(self, level: Tensor) -> Tensor:
        """Unit of codes (m low, u on top) and the two u before it, on top of that -> its levels."""
        per, m_bits = self.per, self.bits - 1
        i = torch.arange(2 ** (self.bits * per + 2))
        u = [(i >> (self.bits * per)) & 1, (i >> (self.bits * per + 1)) & 1]  # u_{t-2}, u_{t-1}
        columns = []
        for c in range(per):
            now = (i >> (m_bits * per + c)) & 1
            m = (i >> (m_bits * c)) & (2**m_bits - 1)
            columns.append(level[4 * m + 2 * (now ^ u[-2]) + u[-1]])
            u.append(now)
        return torch.stack(columns, dim=1)

    def encode(self, y: Tensor, inverse: Tensor, weight: Tensor | None, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """``y fp32 [n, d]`` (overwritten; columns contiguous) and ``inverse [n, 1]`` that brings it to unit variance.

        Returns bytes ``uint8 [n, bytes]`` and the weighted sums <y, q> and <q, q> with the levels chosen, ``fp32 [n]``.
        """
        d = y.shape[1]
        y = y.T.contiguous()  # [t, n]
        cell = self.grid.cells(y, inverse.T, work)
        if d % self.per:
            cell = F.pad(cell, (0, 0, 0, -d % self.per), value=(self.grid.last + 1) // 2)
        u = self._path(cell, work)
        label = torch.bitwise_xor(u[2:], u[:-2], out=work.take("label", cell.shape, torch.uint8)).mul_(2).add_(u[1:-1])
        u = u[2:]
        index = cell.mul_(4).add_(label).view(-1)
        q = torch.index_select(self.near, 0, index, out=work.take("q", (index.numel(),))).view(cell.shape)[:d]
        place = torch.index_select(self.place, 0, index, out=label.view(-1)).view(cell.shape)
        above, below = y.mul_(q), q.mul_(q)
        if weight is None:
            return self._pack(u, place), above.sum(0), below.sum(0)
        return self._pack(u, place), weight @ above, weight @ below

    def _path(self, cell: Tensor, work: Workspace) -> Tensor:
        """The best sequence of u for ``cell int32 [t, n]``, by Viterbi: ``uint8 [t + 2, n]``, from u_{-2} on."""
        t, n = cell.shape

        def new(name: str, *shape: int) -> Tensor:
            return work.take(name, shape, torch.int16)

        taken = new("taken", t, 2, 2, n)  # the u_{t-2} that won, by (u_t, u_{t-1})
        costs = new("costs", 2, 2, 2, n).fill_(FAR)  # of the states (u_t, u_{t-1}), now and next
        costs[0, 0, 0] = 0
        both, metric = new("both", 2, 2, 2, n), new("metric", 3, 2, BLOCK, n)  # metric: labels 0-1, 2-3 and 0-1 again
        # by (u_{t-2}, u_t, u_{t-1}): the state's cost does not depend on u_t, and u_t xor u_{t-2} chooses the pair of labels
        before = [c.as_strided((2, 2, 2, n), (n, 0, 2 * n, 1), c.storage_offset()) for c in costs]
        pair = 2 * BLOCK * n
        step = [metric.as_strided((2, 2, 2, n), (pair, pair, BLOCK * n, 1), metric.storage_offset() + i * n) for i in range(BLOCK)]
        (zero, one), cost, won, now = both, costs.unbind(0), taken.unbind(0), 0
        for start in range(0, t, BLOCK):
            block = cell[start : start + BLOCK].view(-1)
            for label in range(4):
                into = metric[label >> 1, label & 1].view(-1)[: len(block)]
                torch.index_select(self.cost[label], 0, block, out=into)
            metric[2] = metric[0]
            cost[now].sub_(cost[now].amin((0, 1)))  # only differences matter, and the sum must not overflow
            for i in range(len(block) // n if n else 0):
                torch.add(before[now], step[i], out=both)
                now ^= 1
                torch.lt(one, zero, out=won[start + i])  # as int16: to write booleans is slower
                torch.minimum(zero, one, out=cost[now])
        # The way back. A state is the number s = 8 u_t + 4 u_{t-1}; ``link`` holds at bit s the state before
        link = torch.add(taken[:, 0, 0], taken[:, 0, 1], alpha=16, out=new("link", t, n)).mul_(4).sub_(0x8000 - 0x80)
        link.add_(taken[:, 1, 0], alpha=1 << 10).add_(taken[:, 1, 1], alpha=1 << 14)
        state = new("state", t + 1, n)
        last = cost[now].view(4, n).to(torch.int32).mul_(4)
        state[t] = last.add_(torch.arange(4, dtype=torch.int32, device=cell.device)[:, None]).amin(0).bitwise_and_(3).mul_(4)
        rows, links, mask = state.unbind(0), link.unbind(0), new("mask", n).fill_(12)
        for i in range(t - 1, -1, -1):
            torch.bitwise_right_shift(links[i], rows[i + 1], out=rows[i])
            torch.bitwise_and(rows[i], mask, out=rows[i])
        u = work.take("u", (t + 2, n), torch.uint8)
        u[0] = 0
        u[1:] = state.bitwise_right_shift_(3)
        return u

    def _pack(self, u: Tensor, m: Tensor) -> Tensor:
        per, m_bits, n = self.per, self.bits - 1, u.shape[1]
        u, m = u.view(-1, per, n), m.view(-1, per, n)
        unit = u[:, per - 1]
        for c in range(per - 2, -1, -1):
            unit = torch.add(u[:, c], unit, alpha=2)
        if m_bits:
            for c in range(per - 1, -1, -1):
                unit = torch.add(m[:, c], unit, alpha=2**m_bits)
        return packing.pack(unit.T.contiguous(), self.bits * per)

    def decode(self, packed: Tensor, d: int, work: Workspace) -> Tensor:
        """``uint8 [n, bytes] -> fp32 [n, d]``; parallel over coordinates, random access over vectors."""
        width = self.bits * self.per
        codes = packing.unpack(packed, -(-d // self.per), width)
        index = work.take("units", codes.shape, torch.int32).copy_(codes)
        top = index >> (width - min(self.per, 2))
        if self.per == 1:
            index[:, 1:].add_(top[:, :-1], alpha=2 << width)
            index[:, 2:].add_(top[:, :-2], alpha=1 << width)
        else:
            index[:, 1:].add_(top[:, :-1], alpha=1 << width)
        out = packing.lookup(self.table, index, work)
        return out if out.shape[1] == d else out[:, :d]


@lru_cache(maxsize=32)
def trellis4(bits: int, device: torch.device) -> Trellis4:
    """The tables of a width, made once."""
    return Trellis4(bits, trellis_levels(bits), device)
