"""Krea 2: two calls a step, without cache contexts."""

from .base import ATTENTION, MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="krea2",
    title="Krea 2",
    diffusers=InHost(classes=(f"{MODULE}.transformer_krea2:Krea2Transformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.krea2.model:SingleStreamDiT",), blocks=("blocks",), levels=ATTENTION),
)
