"""Rows of a KV cache: a random rotation, Lloyd-Max levels, one bf16 gain a row; appended to, and read where they lie.

The container of ``turbo`` codes a whole tensor with one span of gains; a cache grows, so here each row has a gain of its own:
``ceil(d * bits / 8)`` bytes, then two bytes of gain. The bytes of a row, which native kernels rely on:

| bits | byte ``j`` of a row |
|---|---|
| 4 | code ``2j`` in the low half, ``2j + 1`` in the high one |
| 2 | code ``4j + i`` at bit ``2i`` |
| 5 | ``d/2`` bytes as for 4 bits with the four low bits of each code; then ``d/8`` bytes, the high bit of code ``8j + i`` at bit ``i`` |
| 6 | ``d/2`` bytes the same; then ``d/4`` bytes, the two high bits of code ``4j + i`` at bit ``2i`` |
| 3 | ``d/4`` bytes as for 2 bits with the two low bits of each code; then ``d/8`` bytes, the high bit of code ``8j + i`` at bit ``i`` |
| 8 | code ``j``; levels are uniform: ``(code - 127.5) * gain``, as far as the largest coordinate of the row |

A decoded coordinate is ``level[code] * gain`` in the rotated domain. A query goes there once (``query``), and a weighted
sum of values comes back once (``unrotate``), so that no row is ever rotated on its own. TurboQuant 2504.19874 without its
QJL stage, which has more error at d = 128 and costs bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import TqaiError
from ..workspace import Workspace
from . import packing
from .levels import lloyd_max
from .rotation import matrix

BITS = (2, 3, 4, 5, 6, 8)
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2)}  # bits of a code in the first bytes of a row, and in those after


class Rows:
    """Coder of rows of ``d`` coordinates (a multiple of 8) with ``bits`` of 2 to 6 or 8 each."""

    def __init__(self, d: int, bits: int, seed: int, device: torch.device) -> None:
        if bits not in BITS:
            raise TqaiError(f"a KV cache of {bits} bits asked; it has {', '.join(map(str, BITS))} bits")
        if d % 8 or not 16 <= d <= 1024:
            raise TqaiError(f"head dimension {d} cannot be packed: it must be a multiple of 8 from 16 to 1024; leave those layers exact")
        self.d, self.bits, self.device = d, bits, device
        self.runs, self.basis = (self,), None
        self.step = 0.0  # of levels that are bytes: level = step * byte, at 8 bits step * (byte + 1/2)
        self.row_bytes = d * bits // 8
        self.forward = matrix(d, seed).T.contiguous().to(device)
        self.back = matrix(d, seed).to(device)
        self.asking = self.forward  # of queries; both are a matrix a head where rows are shaped (codecs/shaped.py)
        if bits == 8:
            self.level = (torch.arange(256) - 127.5).to(device)
            self.step = 1.0
            return
        # multiples of 1 / 2048, which kernels read as 14-bit integers; up to 4 bits also bytes times a common step, which moves
        # the error by half a percent
        level = (lloyd_max(bits, d) * 2048).round().clamp(-8191, 8191) / 2048
        small = None
        if bits <= 4:
            self.step = math.ceil(float(level[-1]) * 2048 / 127) / 2048
            small = (level / self.step).round()
            level = small * self.step
        self.level = level.to(device)
        cells = 2048
        reach = float(level[-1]) * 1.05 + 0.1
        self._scale, self._cells = cells / (2 * reach), cells
        centre = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
        self._code = torch.bucketize(centre, (level[1:] + level[:-1]) / 2).to(torch.uint8).to(device)
        low, high = PLANES[bits]
        part = torch.arange(8 // low)
        index = torch.arange(2 ** (8 + high * len(part)))[:, None]  # a byte of low bits, and the high bits above it
        code = ((index >> (low * part)) & (2**low - 1)) | (((index >> (8 + high * part)) & (2**high - 1)) << low)
        wide = {2: torch.float64, 4: torch.complex128}[code.shape[1]]  # several levels read as one number: three times faster
        self._table = level[code].contiguous().view(wide).view(-1).to(device)
        if small is not None:
            four = code if bits < 4 else torch.cat([code.repeat(256, 1), code.repeat_interleave(256, 0)], 1)
            self._bytes = small.to(torch.int8)[four].contiguous().view(torch.int32).view(-1).to(device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x fp32 [..., d]`` -> codes ``uint8 [..., row_bytes]`` and gains ``bf16 [...]``; inf or NaN show in the gain."""
        y = self.into(x).reshape(-1, self.d)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        inverse = self.d**0.5 / norm.clamp_min(1e-30)
        if self.bits == 8:
            unit = 127.5 / y.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            packed = (y * unit).add_(128).clamp_(0, 255).nan_to_num_(0).to(torch.uint8)
        else:
            codes = self.choose((y * inverse).view(x.shape)).view(y.shape)
            low, high = PLANES[self.bits]
            packed = packing.pack(codes & (2**low - 1) if high else codes, low)
            if high:
                packed = torch.cat([packed, packing.pack(codes >> low, high)], dim=1)
        packed = packed.view(*x.shape[:-1], self.row_bytes)
        return packed, self.gain(y.view(x.shape), norm.view(x.shape[:-1]), self.lookup(packed)).to(torch.bfloat16)

    def choose(self, z: Tensor) -> Tensor:
        """Codes ``uint8 [..., d]`` of coordinates ``z`` of unit variance."""
        cell = (z * self._scale).add_(self._cells / 2).clamp_(0, self._cells - 1).nan_to_num_(0).to(torch.int32)
        return self._code.index_select(0, cell.view(-1)).view(z.shape)

    def gain(self, y: Tensor, norm: Tensor, levels: Tensor) -> Tensor:
        """Of rotated rows ``y [..., d]`` that are read as ``levels``."""
        if self.bits >= 4:  # the error is at right angles to the row, so that no score is drawn to zero (RaBitQ 2405.12497)
            return norm * (norm / (y * levels).sum(-1).clamp_min(1e-30))
        return norm / torch.linalg.vector_norm(levels, dim=-1).clamp_min(1e-30)  # keeps the norm: better at 2 and 3 bits

    def lookup(self, codes: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Levels ``fp32 [..., d]`` of codes ``[..., row_bytes]``, rotated and without gain. With ``scratch`` the result lies in
        memory that the next call overwrites."""
        index, flat_index, out, flat_out = (scratch or Scratch()).views(self, codes)
        if self.bits == 8:
            return out.copy_(codes).sub_(127.5)
        self._index(codes, index)
        torch.index_select(self._table, 0, flat_index, out=flat_out)
        return out

    def lookup_bytes(self, codes: Tensor, scratch: Scratch | None = None) -> Tensor:
        """The same as ``int8 [..., d]`` in units of ``step``, of a coder that has one; at 8 bits half a unit lower."""
        if self.bits == 8:
            return codes.bitwise_xor(128).view(torch.int8)
        index, flat_index, out, flat_out = (scratch or Scratch()).views(self, codes, torch.int8)
        if self.bits == 4:
            index.copy_((codes if codes.stride(-2) % 2 == 0 else codes.contiguous()).view(torch.uint16))
        else:
            self._index(codes, index)
        torch.index_select(self._bytes, 0, flat_index, out=flat_out)
        return out

    def _index(self, codes: Tensor, out: Tensor) -> None:
        """Where a table has the levels of each byte, and of the high bits that go with it."""
        low, high = PLANES[self.bits]
        if not high:
            out.copy_(codes)
            return
        own = self.d * low // 8
        wide = high * 8 // low  # high bits that go with a byte of low ones
        above = codes[..., own:]
        out.copy_(torch.stack([(above >> i) & (2**wide - 1) for i in range(0, 8, wide)], dim=-1).flatten(-2))
        out.bitwise_left_shift_(8).bitwise_or_(codes[..., :own])

    def decode(self, codes: Tensor, gain: Tensor) -> Tensor:
        """``fp32 [..., d]``: what :meth:`encode` was given, with its error."""
        return self.out_of(self.lookup(codes) * gain.float()[..., None])

    def parts(self, codes: Tensor, gain: Tensor) -> list[tuple[Rows, Tensor, Tensor]]:
        """Coder, codes and gains of the runs of a row; here one."""
        return [(self, codes, gain)]

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """A tensor ``[..., d]`` by runs."""
        return (x,)

    def into(self, x: Tensor) -> Tensor:
        """``x fp32 [..., d]`` into the domain of :meth:`lookup`."""
        return x @ self.forward

    def out_of(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`into`."""
        return x @ self.back

    def query(self, q: Tensor) -> Tensor:
        """``q [..., d]`` as it meets rows in the domain of :meth:`lookup`, fp32."""
        return q.float() @ self.asking

    def rotate(self, x: Tensor) -> Tensor:
        """Sums of rows ``x [..., d]`` into the domain of :meth:`lookup`, fp32; :meth:`unrotate` takes them back."""
        return self.into(x.float())

    def unrotate(self, x: Tensor) -> Tensor:
        return self.out_of(x)


class Scratch(Workspace):
    """The workspace of one attention; it remembers the views that a lookup needs, since a dozen views a call cost as much as the work."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[tuple[int, int, torch.Size, torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def views(self, coder: Rows, codes: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index and levels of a lookup, each in its shape, and flat for the table."""
        key = (coder.bits, coder.d, codes.shape, dtype)
        if key not in self._views:
            lead = codes.shape[:-1]
            table = torch.empty(0) if coder.bits == 8 else coder._table if dtype == torch.float32 else coder._bytes
            units = coder.d * dtype.itemsize // table.itemsize  # of several levels each
            index = self.take("index", (*lead, units), torch.int32, codes.device)
            out = self.take("levels", (*lead, coder.d), dtype, codes.device)
            self._views[key] = index, index.view(-1), out, out.view(table.dtype).view(-1)
        return self._views[key]


_MADE: dict[tuple[int, int, int, str], Rows] = {}


def rows(d: int, bits: int, seed: int, device: torch.device) -> Rows:
    """The coder of a size, made once."""
    key = (d, bits, seed, str(device))
    if key not in _MADE:
        _MADE[key] = Rows(d, bits, seed, device)
    return _MADE[key]
