"""MiniMax-H3: video and audio, each with a schedule of its own. Modular pipelines only."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="minimax_h3",
    title="MiniMax-H3",
    diffusers=InHost(classes=(f"{MODULE}.transformer_minimax_h3:MiniMaxH3Transformer3DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.minimax.model:MiniMaxH3Model",), blocks=("blocks",)),
)
