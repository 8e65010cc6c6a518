"""LongCat-Image: two calls a step, named by the cache context; the pipeline renormalises the guided output."""

from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

from .base import HEADS, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        LongCatImageTransformer2DModel, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6], **HEADS,
    )  # fmt: skip
    return LongCatImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(), text_processor=None, **no_text())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=3.0, enable_prompt_rewrite=False, **SIZE)
