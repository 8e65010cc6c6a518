"""The photographs that two packages ship, cut into small pictures: what the photo mini learns, and what its judge compares with.

Ten photographs, two fields of view (96 and 192 pixels of the photograph), two sizes (16 x 16 and 32 x 32 pixels; each pixel is
the mean of those it covers). A *prompt* is the number of the photograph, plus ten for the wider field; 20 is the empty prompt.
Values lie in [-1, 1], three channels, float32. photographs.txt names the makers and licences. Needs scikit-image, scikit-learn, pillow.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("brick", "grass", "gravel", "chelsea", "coffee", "hubble", "ihc", "retina", "china", "flower")
FIELDS = (96, 192)  # pixels of the photograph that a picture shows, near and far
SIDES = (16, 32)  # pixels of a picture
SCALE = 2.0  # a mini's latents are pixels times this, so that their standard deviation is near 1
PROMPTS = len(NAMES) * len(FIELDS)
FILES = {"hubble": "hubble_deep_field.jpg", "retina": "retina.jpg"}  # the others are NAME.png
TOO_LARGE = ("retina",)  # shown at half its size
INSIDE = {"retina": 110}  # margin in pixels that is no part of the picture


@lru_cache(maxsize=1)
def photographs() -> tuple[Tensor, ...]:
    """``[3, h, w]`` each."""
    from PIL import Image

    folders = _folder("skimage", "data"), _folder("sklearn", "datasets/images")
    out = []
    for name in NAMES:
        path = folders[1] / f"{name}.jpg" if name in ("china", "flower") else folders[0] / FILES.get(name, f"{name}.png")
        x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        if name in TOO_LARGE:
            x = F.avg_pool2d(x, 2)
        edge = INSIDE.get(name, 0)
        out.append(x[:, edge : x.shape[1] - edge, edge : x.shape[2] - edge].contiguous())
    return tuple(out)


def _folder(package: str, part: str) -> Path:
    """Where an installed package keeps its pictures; the package itself is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install -e '.[photo]'")
    return Path(spec.submodule_search_locations[0]) / part


def crops(prompts: Tensor, side: int, generator: torch.Generator | None = None) -> Tensor:
    """A random part of the photograph of each prompt, ``[n, 3, side, side]``."""
    places = torch.rand(len(prompts), 2, generator=generator).tolist()
    out = torch.empty(len(prompts), 3, side, side)
    for i, (prompt, place) in enumerate(zip(prompts.tolist(), places, strict=True)):
        photo, field = photographs()[prompt % len(NAMES)], FIELDS[prompt // len(NAMES)]
        top, left = (int(p * (n - field + 1)) for p, n in zip(place, photo.shape[1:], strict=True))
        out[i] = F.avg_pool2d(photo[:, top : top + field, left : left + field], field // side)
    return out
