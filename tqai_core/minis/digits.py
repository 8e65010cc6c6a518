"""Real data that every scikit-learn installation carries, and the judge of generated samples.

Images are scikit-learn's 1797 handwritten digits (UCI, 8 x 8) scaled to 16 x 16; clips are the same digits at
10 x 10, bouncing sub-pixel inside 16 x 16 over nine frames. Values lie in [-1, 1], one channel, float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import TqaiError

SIZE, FRAMES, CLASSES = 16, 9, 10


def _raw() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TqaiError("the digits of the minis need scikit-learn: pip install 'tqai-core[demo]'") from error
    data = load_digits()
    return torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None], torch.tensor(data.target)


def images() -> tuple[Tensor, Tensor]:
    """All digits as ``[1797, 1, 16, 16]`` and their labels ``[1797]``."""
    x, y = _raw()
    return F.interpolate(x * 2 - 1, size=(SIZE, SIZE), mode="bilinear", align_corners=False), y


def clips(count: int, seed: int = 0, digit: int = 10, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """``count`` moving digits ``[count, 1, frames, 16, 16]`` and their labels; ``digit`` is their side in pixels."""
    g = torch.Generator().manual_seed(seed)
    x, y = _raw()
    pick = torch.randint(0, len(y), (count,), generator=g)
    reach = (SIZE - digit) / 2  # how far the centre may move, in pixels
    place = (torch.rand(count, 2, generator=g) * 2 - 1) * reach
    speed = torch.rand(count, 2, generator=g) * 2 - 1
    out = torch.empty(count, 1, frames, SIZE, SIZE)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = SIZE / digit
    for frame in range(frames):
        theta[:, :, 2] = -place * 2 / digit
        grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
        out[:, :, frame] = F.grid_sample(x[pick], grid, align_corners=False) * 2 - 1
        place = place + speed
        over = place.abs() > reach
        place = torch.where(over, place.sign() * 2 * reach - place, place)
        speed = torch.where(over, -speed, speed)
    return out, y[pick]


def _centred(frames: Tensor) -> Tensor:
    """Frames ``[n, 16, 16]`` in [-1, 1] with their centre of mass moved to the middle, so that one SVM reads a moving digit."""
    f = ((frames + 1) / 2).clamp(0, 1)
    axis = torch.arange(SIZE).float()
    mass = f.sum((1, 2)).clamp_min(1e-6)
    theta = torch.eye(2, 3).repeat(len(f), 1, 1)
    theta[:, 0, 2] = ((f.sum(1) * axis).sum(1) / mass - 7.5) / 8
    theta[:, 1, 2] = ((f.sum(2) * axis).sum(1) / mass - 7.5) / 8
    grid = F.affine_grid(theta, [len(f), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(f[:, None], grid, align_corners=False)[:, 0]


def _features(samples: Tensor) -> np.ndarray:
    samples = samples.float().cpu()
    if samples.ndim == 5:  # clips: every frame is read on its own
        return _centred(rearrange(samples, "n 1 frame h w -> (n frame) h w")).flatten(1).numpy()
    return samples.flatten(1).clamp(-1, 1).numpy()


@lru_cache(maxsize=2)
def _judge(moving: bool) -> Any:
    from sklearn.svm import SVC

    if moving:
        x, y = clips(700, seed=5)
        return SVC(C=5).fit(_features(x[:, :, ::3]), y.repeat_interleave(3).numpy())
    x, y = images()
    return SVC(C=5).fit(_features(x[:1400]), y[:1400].numpy())


def read(samples: Tensor) -> Tensor:
    """The label an SVM trained on the real digits gives to each image ``[n, 1, 16, 16]`` or to each frame of
    each clip ``[n, 1, 9, 16, 16]`` -> ``[n]`` or ``[n * 9]``."""
    return torch.from_numpy(_judge(samples.ndim == 5).predict(_features(samples)))


def accuracy(samples: Tensor, labels: Tensor) -> float:
    """Share of images (or frames) that are read as the label they were asked for."""
    if samples.ndim == 5:
        labels = labels.repeat_interleave(samples.shape[2])
    return float((read(samples) == labels).float().mean())
