"""Any tensor of a diffusion transformer as tokens ``[b, n, d]``, the grid they lie on, and a small sketch of them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def tokens(x: Tensor) -> Tensor:
    """``[b, n, d]`` as it is; latents ``[b, c, (f,) h, w]`` as their positions ``[b, (f) h w, c]``; others as one row each."""
    if x.ndim == 3:
        return x
    if x.ndim in (4, 5):
        return x.flatten(2).transpose(1, 2)
    return x.reshape(1, -1, x.shape[-1]) if x.ndim else x.reshape(1, 1, 1)


def untokens(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The reverse of :func:`tokens`."""
    return t.transpose(1, 2).reshape(shape) if len(shape) in (4, 5) else t.reshape(shape)


def grid_of(x: Tensor, known: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The grid of ``tokens(x)``: latents carry it, tokens take the ``known`` one where its size fits, else a line."""
    if x.ndim in (4, 5):
        return tuple(x.shape[2:])
    n = tokens(x).shape[1]
    return known if known and math.prod(known) == n else (n,)


def sketch(x: Tensor, width: int) -> Tensor:
    """A few random coordinates of every token, so that a scorer needs no copy (Johnson and Lindenstrauss 1984): ``[b, n, d]`` of any float
    type -> ``fp32 [b, n, min(width, d)]``; lengths and distances are preserved on average."""
    d = x.shape[-1]
    if d <= width:
        return x.float()
    return (x @ _signs(d, width, x.dtype, x.device)).float() / width**0.5


@lru_cache(maxsize=64)
def _signs(d: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(d)
    return (torch.randint(0, 2, (d, width), generator=g) * 2 - 1).to(device, dtype)
