"""Kandinsky 5 and 6, pictures and video."""

from .base import ATTENTION, MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="kandinsky",
    title="Kandinsky 5, 6",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_kandinsky:Kandinsky5Transformer3DModel",
            f"{MODULE}.transformer_kandinsky6:Kandinsky6Transformer3DModel",
        ),
        levels=MODEL,
    ),
    comfyui=InHost(classes=("comfy.ldm.kandinsky5.model:Kandinsky5",), blocks=("visual_transformer_blocks",), levels=ATTENTION),
    second_attention="cross",
)
