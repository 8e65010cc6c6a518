"""WAN 2.1 and 2.2: two calls a step; A14B switches to ``transformer_2`` on the way."""

from .base import Family, InHost

FAMILY = Family(
    name="wan",
    title="WAN 2.1, 2.2",
    diffusers=InHost(
        classes=("diffusers.models.transformers.transformer_wan:WanTransformer3DModel",), blocks=("blocks",), entry="patch_embedding.weight"
    ),
    comfyui=InHost(classes=("comfy.ldm.wan.model:WanModel",), blocks=("blocks",), entry="patch_embedding.weight"),
    tolerances={"quality": 0.06, "balanced": 0.09, "fast": 0.11},
    time_scale=1000.0,
    tokens="patch_embedding",
    rope="rope",
    second_attention="cross",
)
