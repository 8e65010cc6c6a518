"""Codes of 1 to 8 bits <-> bytes, along the last dimension, little-endian.

A row of ``d`` codes takes ``ceil(d * bits / 8)`` bytes: 8 codes of 3 bits in 3 bytes, 4 of 6 bits in 3 bytes, ...; the
last group of a row is cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..workspace import Workspace

# bits -> (codes a group, bytes a group): the smallest group that ends on a byte
GROUPS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 7: (8, 7), 8: (1, 1)}

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_bytes(d: int, bits: int) -> int:
    """Bytes of a row of ``d`` codes."""
    return -(-d * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes [n, d]`` of any integer type, each below ``2 ** bits`` -> ``uint8 [n, row_bytes(d, bits)]``."""
    if bits == 8:
        return codes.to(torch.uint8, copy=True)
    count, size = GROUPS[bits]
    n, d = codes.shape
    if d % count:
        codes = F.pad(codes, (0, -d % count))
    codes = codes.contiguous()
    if size == 1:  # the codes of a byte as one little-endian word; a product without carries gathers them in its top byte
        top = 8 * (count - 1)
        words = codes.to(torch.uint8).view(WORDS[count]) * sum(1 << (top - (8 - bits) * i) for i in range(count))
        return words.bitwise_right_shift_(top).to(torch.uint8).view(n, codes.shape[1] // count)
    groups = codes.view(n, codes.shape[1] // count, count)
    out = (_join(groups, bits)[..., None] >> _shifts(size, 8, torch.int64 if bits * count > 24 else torch.int32, codes.device)).to(
        torch.uint8
    )
    return out.flatten(1)[:, : row_bytes(d, bits)].contiguous()


def unpack(packed: Tensor, d: int, bits: int) -> Tensor:
    """The reverse of :func:`pack`: ``uint8 [n, bytes] -> uint8 or int32 [n, d]``."""
    if bits == 8:
        return packed
    count, size = GROUPS[bits]
    if size == 1:
        words = packed.to(torch.int32)
    else:
        if packed.shape[1] % size:
            packed = F.pad(packed, (0, -packed.shape[1] % size))
        words = _join(packed.reshape(len(packed), packed.shape[1] // size, size), 8)
    codes = (words[..., None] >> _shifts(count, bits, words.dtype, words.device)) & (2**bits - 1)
    return codes.flatten(1)[:, :d].to(torch.int32)


def lookup(table: Tensor, index: Tensor, work: Workspace) -> Tensor:
    """Rows ``table[index]`` (fp32 ``[rows, k]``, ``int32 [n, units]``) side by side: ``[n, units * k]``, in ``work``."""
    n, units = index.shape
    k = table.shape[1]
    # two fp32 numbers read as one of 8 bytes, four as one of 16: the gather is then 3 times faster
    wide = None if torch.compiler.is_compiling() else {1: torch.float32, 2: torch.float64, 4: torch.complex128}.get(k)
    if wide is None:
        return F.embedding(index, table).flatten(1)
    out = work.take("scaled", (n, units * k))
    torch.index_select(table.view(wide).view(-1), 0, index.reshape(-1), out=out.view(-1).view(wide))
    return out


def _shifts(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(0, count * width, width, dtype=dtype, device=device)


def _join(parts: Tensor, width: int) -> Tensor:
    """``[..., k]`` numbers of ``width`` bits -> ``[...]`` words. Up to 24 bits as an fp32 product, which is exact there
    and the fastest way in eager mode."""
    k = parts.shape[-1]
    if k * width <= 24:
        return (parts.float() @ torch.exp2(_shifts(k, width, torch.float32, parts.device))).to(torch.int32)
    return (parts.to(torch.int64) << _shifts(k, width, torch.int64, parts.device)).sum(-1)
