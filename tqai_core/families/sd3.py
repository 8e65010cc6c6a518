"""Stable Diffusion 3 and 3.5: guidance is one batch of [uncond; cond] in diffusers."""

from .base import Family, InHost

MODULE = "comfy.ldm.modules.diffusionmodules.mmdit"
FAMILY = Family(
    name="sd3",
    title="SD3, SD3.5",
    diffusers=InHost(
        classes=("diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",),
        blocks=("transformer_blocks",),
        entry="pos_embed.proj.weight",
    ),
    comfyui=InHost(
        classes=(f"{MODULE}:OpenAISignatureMMDITWrapper", f"{MODULE}:MMDiT"), blocks=("joint_blocks",), entry="x_embedder.proj.weight"
    ),
    tolerances={"quality": 0.055, "balanced": 0.08, "fast": 0.11},
    time_scale=1000.0,
    one_batch=True,
    tokens="pos_embed",
)
