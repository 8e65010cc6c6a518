"""A few random coordinates of every token, so that a scorer needs no copy (Johnson and Lindenstrauss 1984)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def sketch(x: Tensor, width: int) -> Tensor:
    """``[b, n, d]`` of any float type -> ``fp32 [b, n, min(width, d)]``; lengths and distances are preserved on average."""
    d = x.shape[-1]
    if d <= width:
        return x.float()
    return (x @ _signs(d, width, x.dtype, x.device)).float() / width**0.5


@lru_cache(maxsize=64)
def _signs(d: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(d)
    return (torch.randint(0, 2, (d, width), generator=g) * 2 - 1).to(device, dtype)
