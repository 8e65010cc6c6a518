"""How vLLM's CPU backend keeps a block of its cache: rows, or tiles that its matrix kernels read.

Where the CPU has matrix instructions, the backend's writer permutes the keys and values of a block. The permutation is asked of that writer
itself: it writes blocks whose numbers spell out, digit by digit, where each number came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TqaiError

DIGIT = 4  # bits of a digit: 0 to 15 are exact in every dtype of a cache


@dataclass(frozen=True)
class Tiles:
    """Places in a block's memory: ``rows = memory[logical]`` and ``memory = rows[physical]``, rows as ``[2, H, N, D]``; int64, flat."""

    physical: Tensor
    logical: Tensor

    @classmethod
    def ask(cls, write: Callable[[Tensor, Tensor, Tensor], None], block: Tensor, shape: tuple[int, int, int]) -> Tiles:
        """``write(k, v [N, H, D], block [1, ...])`` is the backend's writer, ``block`` one block of the cache, ``shape`` H, N, D."""
        heads, tokens, dim = shape
        count = 2 * heads * tokens * dim
        if block.numel() != count:
            raise TqaiError(f"a block of the cache has {block.numel()} numbers, keys and values make {count}: it cannot be packed")
        ids, found = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        for shift in range(0, count.bit_length(), DIGIT):
            digits = ((ids >> shift) & (2**DIGIT - 1)).to(block.dtype).view(2, heads, tokens, dim)
            probe = torch.zeros_like(block)
            k, v = (digits[i].transpose(0, 1).contiguous() for i in (0, 1))
            write(k, v, probe)
            found += probe.reshape(-1).to(torch.int64) << shift
        if not torch.equal(found.sort().values, ids):
            raise TqaiError("this attention backend does not keep the numbers of keys and values as they are: it cannot be packed")
        return cls(found, found.argsort())
