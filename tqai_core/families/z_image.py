"""Z-Image: a list of pictures in and out; time runs upwards and the pipeline negates the output."""

from .base import ATTENTION, MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="z_image",
    title="Z-Image",
    diffusers=InHost(classes=(f"{MODULE}.transformer_z_image:ZImageTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=(), blocks=("layers",), levels=ATTENTION),  # found as lumina2, whose class it is there
)
