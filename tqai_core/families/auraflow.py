"""AuraFlow: guidance in one batch."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    diffusers=InHost(classes=(f"{MODULE}.auraflow_transformer_2d:AuraFlowTransformer2DModel",), levels=MODEL),
    comfyui=InHost(classes=("comfy.ldm.aura.mmdit:MMDiT",), blocks=("double_layers", "single_layers")),
)
