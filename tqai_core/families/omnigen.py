"""OmniGen 1 (diffusers) and 2 (ComfyUI)."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="omnigen",
    title="OmniGen",
    diffusers=InHost(classes=(f"{MODULE}.transformer_omnigen:OmniGenTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.omnigen.omnigen2:OmniGen2Transformer2DModel",), levels=MODEL),
)
