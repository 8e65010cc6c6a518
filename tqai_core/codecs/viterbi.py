"""Four-state trellis-coded quantisation (Marcellin and Fischer 1990; Ungerboeck 1982), batched in plain torch.

With ``b`` bits there are 2^(b+1) sorted levels in four interleaved subsets, label = index mod 4. A coordinate's code is
u (one bit, chooses the subset together with the two u before it) and m (b - 1 bits, the place in the subset):

    label_t = 2 (u_t xor u_{t-2}) + u_{t-1},     index_t = 4 m_t + label_t,     u_{-1} = u_{-2} = 0

so that the decoder needs the code and two bits of its neighbours only: it is parallel over all coordinates.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing
from .scalar import UNIT, Scratch

BLOCK = 16  # coordinates whose branch metrics are in memory at a time
LEVELS = Path(__file__).with_name("trellis_levels.json")  # positive halves, by benchmarks/trellis_levels.py


@lru_cache(maxsize=8)
def trellis_levels(bits: int) -> Tensor:
    """The ``2 ** (bits + 1)`` levels, ascending and symmetric, trained for a Gaussian of unit variance."""
    half = torch.tensor(json.loads(LEVELS.read_text())[str(bits)], dtype=torch.float32)
    return torch.cat([-half.flip(0), half])


class Trellis4:
    """Tables of one width."""

    chunk = 1 << 19  # coordinates at a time: enough vectors a step of the trellis to hide its many small operations

    def __init__(self, bits: int, level: Tensor, device: torch.device) -> None:
        self.bits, self.per, self.device = bits, UNIT[bits], device
        cells = 2 ** max(11, bits + 7)
        reach = float(level[-1]) * 1.05 + 0.1
        self.scale, self.offset, self.last = cells / (2 * reach), cells / 2, cells - 1
        centre = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
        # four consecutive levels hold the nearest one of every label; the window starts at ``first``
        first = torch.bucketize(centre, (level[:-4] + level[4:]) / 2)
        label = torch.arange(4)
        index = first[:, None] + ((label - first[:, None]) & 3)
        self.index = index.to(torch.int16).to(device)  # [cells, 4]
        self.nearest = level[index].T.contiguous().to(device)  # [4, cells]
        self.level = level.to(device)
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

    def encode(self, y: Tensor, inverse: Tensor, weight: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        """``y fp32 [n, d]`` (overwritten) and ``inverse [n, 1]`` that brings it to unit variance.

        Returns bytes ``uint8 [n, bytes]`` and the weighted sums <y, q> and <q, q> with the levels chosen, ``fp32 [n]``.
        """
        n, d = y.shape
        y = F.pad(y.mul_(inverse), (0, -d % self.per)).T.contiguous()  # [t, n]: a step of the trellis is a contiguous row
        t = len(y)
        cell = torch.add(torch.mul(y, self.scale), self.offset).clamp_(0, self.last).to(torch.int32)
        u = self._path(y, cell)
        label = u.clone()
        label[2:] ^= u[:-2]
        label <<= 1
        label[1:] |= u[:-1]
        index = self.index.view(-1).index_select(0, cell.mul_(4).add_(label).view(-1)).to(torch.int32)
        q = self.level.index_select(0, index).view(t, n)
        y, q = y[:d], q[:d]
        w = 1 if weight is None else weight[:, None]
        above, below = y.mul_(q).mul_(w).sum(0), q.mul(q).mul_(w).sum(0)
        return self._pack(u, (index >> 2).to(torch.uint8).view(t, n), d), above, below

    def _path(self, y: Tensor, cell: Tensor) -> Tensor:
        """The best sequence of u, ``uint8 [t, n]``, by Viterbi. State (u_{t-1}, u_{t-2}); cost ``[2, 2, n]``."""
        t, n = y.shape
        taken = torch.empty(t, 2, 2, n, dtype=torch.bool, device=y.device)  # the u_{t-2} that won, by (u_t, u_{t-1})
        costs = torch.full((2, 2, 2, n), 1e9, device=y.device)
        costs[0, 0, 0] = 0
        halves = [(c, c[:, 0], c[:, 1]) for c in costs]
        a, b = torch.empty_like(costs[0]), torch.empty_like(costs[0])
        metric = torch.empty(BLOCK, 3, 2, n, device=y.device)  # squared distance to labels 0-1, 2-3 and 0-1 again
        near = [(m[0:2], m[1:3]) for m in metric]
        won = taken.unbind(0)
        now = 0
        for start in range(0, t, BLOCK):
            block = y[start : start + BLOCK]
            k = len(block)
            flat = cell[start : start + BLOCK].view(-1)
            for label in range(4):
                gap = self.nearest[label].index_select(0, flat).view(k, n).sub_(block)
                torch.mul(gap, gap, out=metric[:k, label >> 1, label & 1])
            metric[:k, 2] = metric[:k, 0]
            for i in range(k):
                _, zero, one = halves[now]
                now ^= 1
                torch.add(zero, near[i][0], out=a)
                torch.add(one, near[i][1], out=b)
                torch.lt(b, a, out=won[start + i])
                torch.minimum(a, b, out=halves[now][0])
        best = halves[now][0].view(4, n).argmin(0)
        u = torch.empty(t, n, dtype=torch.uint8, device=y.device)
        rows = u.unbind(0)
        rows[t - 1].copy_(best > 1)
        if t > 1:
            rows[t - 2].copy_(best & 1)
        # which of two, by xor: a where of booleans is ten times slower
        bits = taken.view(torch.uint8)
        first, differs = bits[:, :, 0].unbind(0), (bits[:, :, 0] ^ bits[:, :, 1]).unbind(0)
        pair, other = torch.empty(2, n, dtype=torch.uint8, device=y.device), torch.empty(n, dtype=torch.uint8, device=y.device)
        by_zero, by_one = pair.unbind(0)
        for i in range(t - 1, 1, -1):
            torch.bitwise_and(differs[i], rows[i - 1], out=pair)
            pair.bitwise_xor_(first[i])
            torch.bitwise_xor(by_zero, by_one, out=other)
            other.bitwise_and_(rows[i])
            torch.bitwise_xor(other, by_zero, out=rows[i - 2])
        return u

    def _pack(self, u: Tensor, m: Tensor, d: int) -> Tensor:
        per, m_bits, n = self.per, self.bits - 1, u.shape[1]
        u, m = u.view(-1, per, n), m.view(-1, per, n)
        unit = u[:, 0] << (m_bits * per)
        for c in range(1, per):
            unit |= u[:, c] << (m_bits * per + c)
        if m_bits:
            for c in range(per):
                unit |= m[:, c] << (m_bits * c)
        return packing.pack(unit.T.contiguous(), self.bits * per)

    def decode(self, packed: Tensor, d: int) -> Tensor:
        """``uint8 [n, bytes] -> fp32 [n, d]``; parallel over coordinates, random access over vectors."""
        units = -(-d // self.per)
        width = self.bits * self.per
        x = packing.unpack(packed, units, width).to(torch.int32)
        i = x.clone()
        if self.per == 1:
            top = x >> (width - 1)
            i[:, 1:] += top[:, :-1] << (width + 1)
            i[:, 2:] += top[:, :-2] << width
        else:
            i[:, 1:] += (x[:, :-1] >> (width - 2)) << width
        out = F.embedding(i, self.table).flatten(1)
        return out if out.shape[1] == d else out[:, :d]


@lru_cache(maxsize=32)
def trellis4(bits: int, device: torch.device) -> Trellis4:
    """The tables of a width, made once."""
    return Trellis4(bits, trellis_levels(bits), device)
