"""Codes of 1 to 8 bits <-> bytes, along the last dimension, little end first.

A row of ``d`` codes takes ``ceil(d * bits / 8)`` bytes. Codes are packed in groups that fill whole bytes (8 codes of
3 bits in 3 bytes, 4 of 6 bits in 3 bytes, ...); the last group of a row is cut.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# bits -> (codes a group, bytes a group): the smallest group that ends on a byte
GROUPS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 7: (8, 7), 8: (1, 1)}


def row_bytes(d: int, bits: int) -> int:
    """Bytes of a row of ``d`` codes."""
    return -(-d * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes [n, d]`` of any integer type, each below ``2 ** bits`` -> ``uint8 [n, row_bytes(d, bits)]``."""
    if bits == 8:
        return codes.to(torch.uint8)
    count, size = GROUPS[bits]
    n, d = codes.shape
    if d % count:
        codes = F.pad(codes, (0, -d % count))
    if size == 1:
        groups = codes.to(torch.uint8).view(n, codes.shape[1] // count, count)
        packed = groups[..., 0]
        for i in range(1, count):
            packed = packed | (groups[..., i] << (bits * i))
        return packed.contiguous()
    word = _join(codes.reshape(n, codes.shape[1] // count, count), bits)
    out = (word[..., None] >> _shifts(size, 8, word)).to(torch.uint8)  # keeps the low byte
    return out.flatten(1)[:, : row_bytes(d, bits)].contiguous()


def _shifts(count: int, width: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * width, width, dtype=like.dtype, device=like.device)


def _join(parts: Tensor, width: int) -> Tensor:
    """``[..., k]`` numbers of ``width`` bits -> ``[...]`` words. Up to 24 bits as an fp32 product, which is exact there
    and the fastest way in eager mode."""
    k = parts.shape[-1]
    if k * width <= 24:
        return (parts.float() @ torch.exp2(_shifts(k, width, parts.float()))).to(torch.int32)
    wide = parts.to(torch.int64)
    return (wide << _shifts(k, width, wide)).sum(-1)


def unpack(packed: Tensor, d: int, bits: int) -> Tensor:
    """The reverse of :func:`pack`: ``uint8 [n, bytes] -> uint8 [n, d]``."""
    if bits == 8:
        return packed
    count, _ = GROUPS[bits]
    return _split(_words(packed, bits), count, bits)[:, :d].to(torch.uint8)


def _words(packed: Tensor, bits: int) -> Tensor:
    """One integer a group: ``uint8 [n, bytes] -> [n, groups]``."""
    _, size = GROUPS[bits]
    if size == 1:
        return packed.to(torch.int32)
    if packed.shape[1] % size:
        packed = F.pad(packed, (0, -packed.shape[1] % size))
    return _join(packed.view(len(packed), packed.shape[1] // size, size), 8)


def _split(words: Tensor, count: int, width: int) -> Tensor:
    """``[n, groups]`` words -> ``[n, groups * count]`` numbers of ``width`` bits, the reverse of :func:`_join`."""
    return ((words[..., None] >> _shifts(count, width, words)) & (2**width - 1)).flatten(1)


@lru_cache(maxsize=64)
def _byte_table(bits: int) -> Tensor:
    """Codes in one lookup unit: ``[256, 8 // bits]`` for widths that divide a byte, pairs for the others."""
    count = 8 // bits if 8 % bits == 0 else (2 if bits in (3, 6) else 1)
    unit = torch.arange(2 ** (bits * count))
    return torch.stack([(unit >> (bits * i)) & (2**bits - 1) for i in range(count)], dim=1)


def lookup_table(levels: Tensor, bits: int) -> Tensor:
    """The table that :func:`lookup` reads: unit of packed codes -> the levels of its codes."""
    return levels[_byte_table(bits).to(levels.device)]


def lookup(packed: Tensor, d: int, bits: int, table: Tensor) -> Tensor:
    """Unpack and dequantise at once: ``uint8 [n, bytes] -> [n, d]`` in the table's dtype, one gather."""
    count = table.shape[1]
    if 8 % bits == 0:
        units = packed.to(torch.int32)
    else:
        group, _ = GROUPS[bits]
        units = _split(_words(packed, bits), group // count, bits * count).to(torch.int32)
    out = F.embedding(units, table).flatten(1)
    return out if out.shape[1] == d else out[:, :d]
