"""The scalar quantiser of ``turbo``: each coordinate takes the nearest Lloyd-Max level, by one table lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing
from .levels import lloyd_max

# codes a lookup unit: the decoder reads a whole unit by one gather
UNIT = {1: 8, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}


def run_bytes(d: int, bits: int) -> int:
    """Bytes of a run of ``d`` codes: whole units."""
    return packing.row_bytes(-(-d // UNIT[bits]), UNIT[bits] * bits)


class Scratch:
    """Memory that the chunks of one call share: fresh pages would cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def like(self, x: Tensor, name: str = "") -> Tensor:
        """An fp32 tensor of the shape of ``x``, its content undefined."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < x.numel():
            kept = self._kept[name] = torch.empty(x.numel(), dtype=torch.float32, device=x.device)
        return kept[: x.numel()].view(x.shape)


class Scalar:
    """Tables of one width for coordinates of unit variance of a random rotation of R^d (d None: Gaussian)."""

    chunk = 1 << 18  # coordinates at a time: a MiB of fp32 hides the calls and stays in the cache between passes

    def __init__(self, bits: int, d: int | None, device: torch.device) -> None:
        self.bits, self.per = bits, UNIT[bits]
        level = lloyd_max(bits, d)
        cells = 2 ** max(11, bits + 6)
        reach = float(level[-1]) * 1.05 + 0.1
        self.scale, self.offset, self.last = cells / (2 * reach), cells / 2, cells - 1
        centre = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
        self.code = torch.bucketize(centre, (level[1:] + level[:-1]) / 2).to(torch.uint8).to(device)
        unit = torch.arange(2 ** (bits * self.per))[:, None] >> torch.arange(0, bits * self.per, bits)
        self.table = level[unit & (2**bits - 1)].contiguous().to(device)
        # two fp32 levels read as one 8-byte number, four as one of 16: the gather is then 3 times faster
        self.wide = {2: torch.float64, 4: torch.complex128}.get(self.per)

    def encode(self, y: Tensor, inverse: Tensor, weight: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        """``y fp32 [n, d]`` (overwritten) and ``inverse [n, 1]`` that brings it to unit variance.

        Returns bytes ``uint8 [n, bytes]`` and the weighted sums <y, q> and <q, q> with the levels chosen, ``fp32 [n]``.
        """
        y.mul_(inverse * self.scale)
        cell = torch.add(y, self.offset, out=scratch.like(y)).clamp_(0, self.last).to(torch.int32)
        codes = self.code.index_select(0, cell.view(-1)).view(y.shape)
        packed = packing.pack(F.pad(codes, (0, -y.shape[1] % self.per)), self.bits)
        q = self.decode(packed, y.shape[1])
        if weight is None:
            above, below = y.mul_(q).sum(-1), torch.linalg.vector_norm(q, dim=-1).square()
        else:
            above, below = y.mul_(q) @ weight, q.square() @ weight
        return packed, above.mul_(1 / self.scale), below

    def decode(self, packed: Tensor, d: int) -> Tensor:
        """``uint8 [n, bytes] -> fp32 [n, d]``: unpacks and dequantises at once."""
        units = packed.to(torch.int32) if 8 % self.bits == 0 else packing.unpack(packed, -(-d // self.per), self.bits * self.per)
        if self.wide is not None and not torch.compiler.is_compiling():
            out = (
                self.table.view(self.wide)
                .view(-1)
                .index_select(0, units.reshape(-1))
                .view(torch.float32)
                .view(len(packed), units.shape[1] * self.per)
            )
        else:
            out = F.embedding(units, self.table).flatten(1)
        return out if out.shape[1] == d else out[:, :d]


_MADE: dict[tuple[int, int | None, str], Scalar] = {}  # a plain dict: torch.compile reads it, but not a cache


def scalar(bits: int, d: int | None, device: torch.device) -> Scalar:
    """The tables of a width, made once."""
    key = (bits, d, str(device))
    if key not in _MADE:
        _MADE[key] = Scalar(bits, d, device)
    return _MADE[key]
