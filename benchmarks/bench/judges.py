"""Who looks at generated pictures as a user does: the distance of their features to real ones, and what is read in them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from einops import rearrange
from minis.judge import Judge as Photographs
from minis.judge import frechet, moments
from torch import Tensor

from tqai_core.minis import digits

__all__ = ["Clips", "Eye", "Photographs"]

LOW, REAL, SEED = 8, 2000, 900  # low frequencies a side; real clips behind the mean and covariance, and their seed


class Eye(Protocol):
    def distance(self, pixels: Tensor) -> float: ...

    def accuracy(self, pixels: Tensor, prompts: Tensor) -> float: ...


class Clips:
    """Of moving digits ``[n, 1, 9, 16, 16]``: Fréchet distance of the 8 x 8 lowest cosine coefficients of each frame to those of real
    clips, and the share of frames that an SVM reads as asked."""

    def distance(self, pixels: Tensor) -> float:
        return frechet(moments(_low(pixels)), _real())

    def accuracy(self, pixels: Tensor, prompts: Tensor) -> float:
        return digits.accuracy(pixels, prompts)


def _low(pixels: Tensor) -> Tensor:
    """``[n, 1, frames, 16, 16]`` in [-1, 1] -> ``[n frames, 64]``."""
    k, x = torch.arange(LOW)[:, None], torch.arange(digits.SIZE) + 0.5
    basis = torch.cos(math.pi * k * x / digits.SIZE) * math.sqrt(2 / digits.SIZE)
    basis[0] /= math.sqrt(2)
    frames = rearrange(pixels.float().clamp(-1, 1), "n 1 f h w -> (n f) h w")
    return (basis @ frames @ basis.T).flatten(1)


@lru_cache(maxsize=1)
def _real() -> tuple[Tensor, Tensor]:
    return moments(_low(digits.clips(REAL, seed=SEED)[0]))
