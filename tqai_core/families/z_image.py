"""Z-Image: a list of pictures in and out; time runs upwards and the pipeline negates the output."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="z_image",
    title="Z-Image",
    diffusers=InHost(classes=(f"{MODULE}.transformer_z_image:ZImageTransformer2DModel",), levels=MODEL),
)
