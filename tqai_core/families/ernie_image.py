"""ERNIE-Image."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="ernie_image",
    title="ERNIE-Image",
    diffusers=InHost(classes=(f"{MODULE}.transformer_ernie_image:ErnieImageTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.ernie.model:ErnieImageModel",), levels=MODEL),
)
