"""Any tensor of a diffusion transformer as tokens ``[b, n, d]``, and the grid they lie on."""

from __future__ import annotations

import math

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
