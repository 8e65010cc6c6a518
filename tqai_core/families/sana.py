"""Sana, pictures and video, with DPM++ on flow sigmas."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="sana",
    title="Sana, Sana-Video",
    diffusers=InHost(
        classes=(
            f"{MODULE}.sana_transformer:SanaTransformer2DModel",
            f"{MODULE}.transformer_sana_video:SanaVideoTransformer3DModel",
        ),
        levels=MODEL,
    ),
)
