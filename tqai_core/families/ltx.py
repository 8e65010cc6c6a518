"""LTX-Video and LTX-2: LTX-2 returns video and audio, both are forecast."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="ltx",
    title="LTX-Video, LTX-2",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_ltx:LTXVideoTransformer3DModel",
            f"{MODULE}.transformer_ltx2:LTX2VideoTransformer3DModel",
        ),
        levels=MODEL,
    ),
    comfyui=InHost(
        classes=(
            "comfy.ldm.lightricks.model:LTXVModel",
            "comfy.ldm.lightricks.av_model:LTXAVModel",
        ),
        blocks=("transformer_blocks",),
    ),
    second_attention="cross",
)
