"""Flux.1 and Flux.2: one call a step (distilled guidance) or two (true CFG); the time is given as sigma itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Family


class Flux(Family):
    def grid(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        ids = kwargs.get("img_ids")
        if not isinstance(ids, Tensor):
            return ()
        ids = ids[0] if ids.ndim == 3 else ids
        sizes = (ids.amax(0) - ids.amin(0) + 1).int().tolist()
        return tuple(size for size in sizes if size > 1)


FAMILY = Flux(
    "flux",
    ("FluxTransformer2DModel", "Flux2Transformer2DModel"),
    ("transformer_blocks", "single_transformer_blocks"),
    1.0,
    True,
    "x_embedder",
)
