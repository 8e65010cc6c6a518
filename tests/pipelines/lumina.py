"""Lumina-Next: one batch; the time is 1 - sigma; the model's second half of channels is thrown away by the pipeline."""

from diffusers import LuminaNextDiT2DModel, LuminaPipeline

from .base import ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        LuminaNextDiT2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2,
        num_kv_heads=2, multiple_of=16, cross_attention_dim=WIDTH,
    )  # fmt: skip
    return LuminaPipeline(transformer=transformer, scheduler=euler(1.0), vae=vae(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, **SIZE)
