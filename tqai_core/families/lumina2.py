"""Lumina-Image 2 and its kin; in ComfyUI the class of Z-Image too. Guidance may stop half way: that branch then ends."""

from .base import ATTENTION, MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="lumina2",
    title="Lumina-Image 2",
    diffusers=InHost(classes=(f"{MODULE}.transformer_lumina2:Lumina2Transformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.lumina.model:NextDiT",), blocks=("layers",), levels=ATTENTION),
)
