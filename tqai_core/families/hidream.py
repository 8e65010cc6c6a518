"""HiDream-I1."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="hidream",
    title="HiDream-I1",
    diffusers=InHost(classes=(f"{MODULE}.transformer_hidream_image:HiDreamImageTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.hidream.model:HiDreamImageTransformer2DModel",), levels=MODEL),
)
