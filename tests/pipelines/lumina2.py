"""Lumina 2: the time is 1 - sigma and the output negated; two calls a step without a context, of which the second stops half way."""

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from .base import ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae

FAST = True


def pipe():
    transformer = random(
        Lumina2Transformer2DModel, sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=2, multiple_of=16, axes_dim_rope=[8, 4, 4], cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Lumina2Pipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, cfg_trunc_ratio=0.5, **SIZE)
