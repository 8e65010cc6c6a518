"""Ovis-Image: two calls a step, named by the cache context."""

from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

from .base import HEADS, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        OvisImageTransformer2DModel, patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    return OvisImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), negative_prompt=None, guidance_scale=3.0, **SIZE)
