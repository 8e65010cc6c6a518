"""Cosmos Predict 2 and later, where the schedule is a flow."""

from .base import ATTENTION, MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="cosmos",
    title="Cosmos Predict 2, 2.5, 3",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_cosmos:CosmosTransformer3DModel",
            f"{MODULE}.transformer_cosmos3:Cosmos3OmniTransformer",
        ),
        levels=MODEL,
    ),
    comfyui=InHost(classes=("comfy.ldm.cosmos.predict2:MiniTrainDIT",), blocks=("blocks",), levels=ATTENTION),
    second_attention="cross",
)
