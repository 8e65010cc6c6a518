"""Chroma: a Flux without distilled guidance, two calls a step."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="chroma",
    title="Chroma",
    diffusers=InHost(classes=(f"{MODULE}.transformer_chroma:ChromaTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.chroma.model:Chroma",), blocks=("double_blocks", "single_blocks")),
)
