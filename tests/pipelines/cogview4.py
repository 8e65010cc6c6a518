"""CogView4: two calls a step, named by the cache context."""

from diffusers import CogView4Pipeline, CogView4Transformer2DModel

from .base import HEADS, SIZE, WIDTH, WORDS, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        CogView4Transformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, time_embed_dim=32,
        condition_dim=4, pos_embed_max_size=64, sample_size=32, rope_axes_dim=(32, 32), **HEADS,
    )  # fmt: skip
    return CogView4Pipeline(transformer=transformer, scheduler=euler(base_shift=0.25, max_shift=0.75), vae=vae(), **no_text())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(1, WORDS, WIDTH), guidance_scale=3.0, **SIZE)
