"""Latte: DDIM on noise prediction, no flow: computed exactly."""

from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from .base import HEADS, SIZE, WIDTH, no_text, prompts, random, sample, vae

EXACT = "sigma"


def pipe():
    transformer = random(
        LatteTransformer3DModel, sample_size=8, num_layers=1, patch_size=2, video_length=4, caption_channels=WIDTH, in_channels=4,
        cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, **HEADS,
    )  # fmt: skip
    return LattePipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(), **no_text())


def call(pipe, steps, seed):
    shape = dict(video_length=4, clean_caption=False, mask_feature=False, **SIZE)
    return sample(pipe, steps, seed, **prompts(), negative_prompt=None, guidance_scale=3.0, **shape)
