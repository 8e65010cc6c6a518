"""One logarithmic gain a vector: safe from fp16 overflow, half the bytes of an fp16 norm.

Code 0 is the zero vector; codes 1.. run over the octaves below the largest gain of the call. A vector smaller than
that range (2^-16 of the largest with 8 bits, 2^-32 with 16) becomes zero, which loses less than it could add.
"""

from __future__ import annotations

import torch
from torch import Tensor

OCTAVES = {8: 16.0, 16: 32.0}


def encode(g: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Gains ``fp32 [n]``, >= 0 -> codes ``uint8`` or ``uint16 [n]`` and the span ``fp32 [2]`` (lowest, step; octaves)."""
    top_code, octaves = 2**bits - 2, OCTAVES[bits]
    dtype = torch.uint8 if bits == 8 else torch.uint16
    if g.numel() == 0:
        return torch.zeros(0, dtype=dtype, device=g.device), torch.zeros(2, device=g.device)
    log = g.clamp_min(1e-38).log2()
    high = log.amax()
    low = torch.where(g > 0, log, high).amin()
    low = torch.maximum(low, high - octaves)  # one tiny vector must not coarsen all others
    step = ((high - low) / (top_code - 1)).clamp_min(1e-9)
    code = ((log - low) / step).round_().add_(1).clamp_(0, top_code)  # zero and what lies below the range: 0
    return (code * (g > 0)).to(torch.int32).to(dtype), torch.stack([low, step])


def decode(code: Tensor, span: Tensor) -> Tensor:
    """Gains ``fp32 [n]`` from :func:`encode`'s codes and span."""
    c = code.to(torch.int32).float()
    return torch.where(c > 0, torch.exp2(span[0] + (c - 1) * span[1]), torch.zeros_like(c))
