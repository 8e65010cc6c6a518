"""Rows of a KV cache: a random rotation, Lloyd-Max levels, one bf16 gain a row; appended to, and read where they lie.

The container of ``turbo`` codes a whole tensor with one span of gains; a cache grows, so here each row stands for itself:
``ceil(d * bits / 8)`` bytes, then two bytes of gain. The bytes of a row, which native kernels rely on:

| bits | byte ``j`` of a row |
|---|---|
| 4 | code ``2j`` in the low half, ``2j + 1`` in the high one |
| 2 | code ``4j + i`` at bit ``2i`` |
| 3 | ``d/4`` bytes as for 2 bits with the two low bits of each code; then ``d/8`` bytes, the high bit of code ``8j + i`` at bit ``i`` |
| 8 | code ``j``; levels are uniform: ``(code - 127.5) * gain`` |

A decoded coordinate is ``level[code] * gain`` in the rotated domain. A query goes there once (``rotate``), and a weighted
sum of values comes back once (``unrotate``), so that no row is ever rotated on its own. TurboQuant 2504.19874 without its
QJL stage, which has three times the error at d = 128 and costs bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import packing
from .levels import lloyd_max
from .rotation import matrix

BITS = (2, 3, 4, 8)
REACH = 4.5  # standard deviations that the 256 uniform levels of 8 bits cover


class Rows:
    """Coder of rows of ``d`` coordinates (a multiple of 8) with ``bits`` of 2, 3, 4 or 8 each."""

    def __init__(self, d: int, bits: int, seed: int, device: torch.device) -> None:
        if bits not in BITS:
            raise ValueError(f"a KV cache of {bits} bits asked; it has {', '.join(map(str, BITS))} bits")
        if d % 8 or not 16 <= d <= 1024:
            raise ValueError(f"head dimension {d} cannot be packed: it must be a multiple of 8 from 16 to 1024; leave those layers exact")
        self.d, self.bits, self.device = d, bits, device
        self.row_bytes = d * bits // 8
        self.forward = matrix(d, seed).T.contiguous().to(device)
        self.back = matrix(d, seed).to(device)
        if bits == 8:
            self.level = (torch.arange(256) - 127.5).to(device)
            self.unit = 127.5 / REACH
            return
        level, self.unit = lloyd_max(bits, d), 1.0
        self.level = level.to(device)
        cells = 2048
        reach = float(level[-1]) * 1.05 + 0.1
        self._scale, self._cells = cells / (2 * reach), cells
        centre = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
        self._code = torch.bucketize(centre, (level[1:] + level[:-1]) / 2).to(torch.uint8).to(device)
        if bits == 3:  # index: a byte of low bits, and four high bits above it
            index = torch.arange(4096)[:, None]
            part = torch.arange(4)
            code = ((index >> (2 * part)) & 3) | (((index >> (8 + part)) & 1) << 2)
        else:
            code = (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & (2**bits - 1)
        wide = {2: torch.float64, 4: torch.complex128}[code.shape[1]]  # several levels read as one number: three times faster
        self._table = level[code].contiguous().view(wide).view(-1).to(device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x fp32 [..., d]`` -> codes ``uint8 [..., row_bytes]`` and gains ``bf16 [...]``; inf or NaN show in the gain."""
        y = x.reshape(-1, self.d) @ self.forward
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        inverse = self.d**0.5 / norm.clamp_min(1e-30)
        if self.bits == 8:
            codes = (y * (inverse * self.unit)).add_(128).clamp_(0, 255).nan_to_num_(0).to(torch.uint8)
            packed = codes
        else:
            cell = (y * (inverse * self._scale)).add_(self._cells / 2).clamp_(0, self._cells - 1).nan_to_num_(0).to(torch.int32)
            codes = self._code.index_select(0, cell.view(-1)).view(y.shape)
            if self.bits == 3:
                packed = torch.cat([packing.pack(codes & 3, 2), packing.pack(codes >> 2, 1)], dim=1)
            else:
                packed = packing.pack(codes, self.bits)
        q = self.lookup(packed)
        below = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-30)
        if self.bits >= 4:  # least squares
            gain = (y * q).sum(-1, keepdim=True) / below.square()
        else:  # keeps the norm: lower perplexity at 2 and 3 bits
            gain = norm / below
        return packed.view(*x.shape[:-1], self.row_bytes), gain.to(torch.bfloat16).view(x.shape[:-1])

    def lookup(self, codes: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Levels ``fp32 [..., d]`` of codes ``[..., row_bytes]``, rotated and without gain. With ``scratch`` the result lies in
        memory that the next call overwrites."""
        index, flat_index, out, flat_out = (scratch or Scratch()).views(self, codes)
        if self.bits == 8:
            return out.copy_(codes).sub_(127.5)
        if self.bits == 3:
            quarter = self.d // 4
            high = codes[..., quarter:]
            index.copy_(torch.stack([high & 15, high >> 4], dim=-1).flatten(-2))
            index.bitwise_left_shift_(8).bitwise_or_(codes[..., :quarter])
        else:
            index.copy_(codes)
        torch.index_select(self._table, 0, flat_index, out=flat_out)
        return out

    def decode(self, codes: Tensor, gain: Tensor) -> Tensor:
        """``fp32 [..., d]``: what :meth:`encode` was given, with its error."""
        return (self.lookup(codes) * gain.float()[..., None]) @ self.back

    def rotate(self, q: Tensor) -> Tensor:
        """``q [..., d]`` into the domain of :meth:`lookup`, fp32."""
        return q.float() @ self.forward

    def unrotate(self, x: Tensor) -> Tensor:
        return x @ self.back


class Scratch:
    """Memory that lookups share: fresh pages cost more than the work on them, and so do a dozen views a call."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[int, int, torch.Size], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def views(self, coder: Rows, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index and levels of a lookup, each in its shape and flat as the table wants it."""
        key = (coder.bits, coder.d, codes.shape)
        if key not in self._views:
            lead, wide = codes.shape[:-1], torch.float32 if coder.bits == 8 else coder._table.dtype
            units = {2: coder.d // 4, 3: coder.d // 4, 4: coder.d // 2, 8: 0}[coder.bits]
            index = self._take((*lead, units), torch.int32, codes.device)
            out = self._take((*lead, coder.d), torch.float32, codes.device)
            self._views[key] = index, index.view(-1), out, out.view(wide).view(-1)
        return self._views[key]

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        have = self._memory.get(dtype)
        if have is None or have.numel() < count:
            have = self._memory[dtype] = torch.empty(count, dtype=dtype, device=device)
        return have[:count].view(shape)


_MADE: dict[tuple[int, int, int, str], Rows] = {}


def rows(d: int, bits: int, seed: int, device: torch.device) -> Rows:
    """The coder of a size, made once."""
    key = (d, bits, seed, str(device))
    if key not in _MADE:
        _MADE[key] = Rows(d, bits, seed, device)
    return _MADE[key]
