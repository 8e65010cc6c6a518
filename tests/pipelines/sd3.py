"""Stable Diffusion 3: one batch, no cache context."""

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from .base import HEADS, SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae


def pipe():
    transformer = random(
        SD3Transformer2DModel, sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, caption_projection_dim=32,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=32, **HEADS,
    )  # fmt: skip
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text(2, 3))


def call(pipe, steps, seed):
    text = {}
    for name, first in (("", 7), ("negative_", 8)):
        text[f"{name}prompt_embeds"] = rnd(1, WORDS, WIDTH, seed=first)
        text[f"{name}pooled_prompt_embeds"] = rnd(1, WIDTH, seed=first + 9)
    return sample(pipe, steps, seed, **text, guidance_scale=4.0, **SIZE)
