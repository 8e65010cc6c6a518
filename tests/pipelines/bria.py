"""Bria 3.2: one batch of the guidance's two halves."""

from diffusers import BriaPipeline, BriaTransformer2DModel

from .base import HEADS, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        BriaTransformer2DModel, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        axes_dims_rope=[4, 6, 6], **HEADS,
    )  # fmt: skip
    return BriaPipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=3.0, **SIZE)
