"""The judge of generated photographs: a small network that reads a picture's label, and the Fréchet distance of its features.

Three convolutions and a mean over the picture: 64 features, of which one linear layer reads the photograph's number. It was trained on
real crops of both sizes (train_judge.py). Beside its weights lie the mean and the covariance of the features of other real crops: who
judges needs no photographs. The distance is Fréchet's between two Gaussians, as in FID (Heusel et al. 1706.08500), in these features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("judge.safetensors")
FEATURES, CLASSES, SIDES = 64, 10, (16, 32)


class Reader(nn.Module):
    """Pixels ``[n, 3, h, w]`` in [-1, 1] -> features ``[n, 64]``, labels' scores ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, FEATURES)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])
        self.read = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.silu(norm(convolution(x)))
            x = F.avg_pool2d(x, 2) if i < 2 else x
        features = x.mean((2, 3))
        return features, self.read(features)


@dataclass(frozen=True)
class Judge:
    """``real``: the mean ``[64]`` and covariance ``[64, 64]`` of real crops, by their side in pixels."""

    reader: Reader
    real: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls) -> Judge:
        tensors = load_file(FILE)
        real = {side: (tensors.pop(f"mean_{side}"), tensors.pop(f"covariance_{side}")) for side in SIDES}
        reader = Reader().eval().requires_grad_(False)
        reader.load_state_dict(tensors)
        return cls(reader, real)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.reader(part.clamp(-1, 1))[0] for part in pixels.float().split(250)])

    def read(self, pixels: Tensor) -> Tensor:
        """The number of the photograph that each picture seems to be of, ``[n]``."""
        return self.reader.read(self.features(pixels)).argmax(1)

    def accuracy(self, pixels: Tensor, prompts: Tensor) -> float:
        return float((self.read(pixels) == prompts % CLASSES).float().mean())

    def distance(self, pixels: Tensor) -> float:
        """Fréchet distance of the pictures to real ones of their size."""
        return frechet(moments(self.features(pixels)), self.real[pixels.shape[-1]])


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), torch.cov(features.T)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^1/2); the trace of the root by the singular values of A^1/2 B^1/2."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    cross = torch.linalg.svdvals(root(cov_a) @ root(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
