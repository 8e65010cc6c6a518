"""HunyuanImage 2.1: a guider decides the branches; the contexts are ``pred_cond`` and ``pred_uncond``."""

from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel
from diffusers.guiders import AdaptiveProjectedMixGuidance

from .base import HEADS, ONES, WIDTH, WORDS, euler, no_text, random, rnd, sample


def pipe():
    transformer = random(
        HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        patch_size=(1, 1), text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8), **HEADS,
    )  # fmt: skip
    vae = random(
        AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 4, layers_per_block=1,
        spatial_compression_ratio=8, sample_size=64, scaling_factor=0.5,
    )  # fmt: skip
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    return HunyuanImagePipeline(transformer=transformer, scheduler=euler(), vae=vae, guider=guider, **no_text(2))


def call(pipe, steps, seed):
    text = {}
    for name, first in (("prompt", 7), ("negative_prompt", 8)):
        text |= {f"{name}_embeds": rnd(1, WORDS, WIDTH, seed=first), f"{name}_embeds_mask": ONES}
        text |= {f"{name}_embeds_2": rnd(1, WORDS, WIDTH, seed=first + 9), f"{name}_embeds_mask_2": ONES}
    return sample(pipe, steps, seed, **text, height=64, width=64)
