"""Qwen-Image, its edit models, and its successor, whose first step fills a K/V cache: a step that is always computed."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image, Edit, 2.1",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_qwenimage:QwenImageTransformer2DModel",
            f"{MODULE}.transformer_qwenimage21:QwenImage21Transformer2DModel",
        ),
        levels=MODEL,
    ),
    comfyui=InHost(classes=("comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",), blocks=("transformer_blocks",)),
)
