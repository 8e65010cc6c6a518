"""A family that nobody has: one block of a linear map and an attention, in both hosts."""

from .base import Family, InHost

FAMILY = Family(
    name="toy",
    diffusers=InHost(classes=("toys.check:ToyTransformer",), blocks=("layers",), entry="inlet.weight"),
    comfyui=InHost(classes=("comfy.ldm.toy.model:ToyModel",), blocks=("layers",), entry="inlet.weight"),
    tolerances={"quality": 0.11, "balanced": 0.22, "fast": 0.33},
    time_scale=1.0,
)
