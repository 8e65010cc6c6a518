"""HunyuanVideo, its Framepack and HunyuanImage. The newer HunyuanVideo guides by a guider object."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="hunyuan",
    title="HunyuanVideo 1.0, 1.5, Framepack, HunyuanImage 2.1",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_hunyuan_video:HunyuanVideoTransformer3DModel",
            f"{MODULE}.transformer_hunyuan_video15:HunyuanVideo15Transformer3DModel",
            f"{MODULE}.transformer_hunyuan_video_framepack:HunyuanVideoFramepackTransformer3DModel",
            f"{MODULE}.transformer_hunyuanimage:HunyuanImageTransformer2DModel",
        ),
        levels=MODEL,
    ),
    comfyui=InHost(classes=("comfy.ldm.hunyuan_video.model:HunyuanVideo",), blocks=("double_blocks", "single_blocks")),
)
