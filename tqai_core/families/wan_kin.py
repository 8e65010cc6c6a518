"""Models built on WAN that diffusers gives classes of their own: VACE, Animate, SkyReels V2. ComfyUI derives these from WAN."""

from .base import MODEL, Family, InHost

MODULE = "diffusers.models.transformers"
FAMILY = Family(
    name="wan_kin",
    title="WAN VACE, Animate, SkyReels V2",
    diffusers=InHost(
        classes=(
            f"{MODULE}.transformer_wan_vace:WanVACETransformer3DModel",
            f"{MODULE}.transformer_wan_animate:WanAnimateTransformer3DModel",
            f"{MODULE}.transformer_wan_animate_2:WanAnimate2Transformer3DModel",
            f"{MODULE}.transformer_skyreels_v2:SkyReelsV2Transformer3DModel",
        ),
        levels=MODEL,
    ),
)
