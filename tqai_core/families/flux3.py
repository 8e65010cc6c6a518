"""FLUX.3."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="flux3",
    title="FLUX.3",
    diffusers=InHost(classes=(f"{MODULE}.transformer_flux3:Flux3Transformer2DModel",), levels=MODEL),
)
