"""ACE-Step: music."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="ace_step",
    title="ACE-Step",
    diffusers=InHost(classes=(f"{MODULE}.ace_step_transformer:AceStepTransformer1DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.ace.model:ACEStepTransformer2DModel",), levels=MODEL),
)
