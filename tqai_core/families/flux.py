"""Flux.1 and Flux.2: one call a step (distilled guidance) or two (true CFG); the time is given as sigma itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Family, InHost


class Flux(Family):
    def grid(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        ids = kwargs.get("img_ids")
        if not isinstance(ids, Tensor):
            return ()
        ids = ids[0] if ids.ndim == 3 else ids
        sizes = (ids.amax(0) - ids.amin(0) + 1).int().tolist()
        return tuple(size for size in sizes if size > 1)


MODULE = "diffusers.models.transformers.transformer_flux"
FAMILY = Flux(
    name="flux",
    title="FLUX.1, FLUX.2",
    diffusers=InHost(
        classes=(f"{MODULE}:FluxTransformer2DModel", f"{MODULE}2:Flux2Transformer2DModel"),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        entry="x_embedder.weight",
    ),
    comfyui=InHost(classes=("comfy.ldm.flux.model:Flux",), blocks=("double_blocks", "single_blocks"), entry="img_in.weight"),
    tolerances={"quality": 0.045, "balanced": 0.075, "fast": 0.1},
    time_scale=1.0,
    text_first=True,
    tokens="x_embedder",
)
