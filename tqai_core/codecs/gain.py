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
    log = g.log2()
    high = log.amax()
    # the lowest of those that are not zero, but one tiny vector must not coarsen all others
    low = torch.maximum(log.nan_to_num(neginf=128.0).amin(), high - octaves)
    step = ((high - low) / (top_code - 1)).clamp_min(1e-9)
    code = log.sub_(low).div_(step).add_(1.5).clamp_(0, top_code)  # zero and what lies below the range: 0
    code = code.to(torch.uint8) if bits == 8 else code.to(torch.int32).to(dtype)
    return code, torch.stack([low, step])


def decode(code: Tensor, span: Tensor) -> Tensor:
    """Gains ``fp32 [n]`` from :func:`encode`'s codes and span."""
    low, step = span.unbind()
    c = code.float() if code.dtype == torch.uint8 else code.to(torch.int32).float()
    return torch.addcmul(low - step, c, step).exp2_().masked_fill_(c == 0, 0.0)
