"""Bria Fibo 2: two calls a step without a context."""

from diffusers import AutoencoderKLFlux2, BriaFibo2Pipeline, BriaFibo2Transformer2DModel

from .base import ONES, SIZE, WIDTH, WORDS, euler, prompts, random, sample, vae


def pipe():
    transformer = random(
        BriaFibo2Transformer2DModel, in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=WIDTH,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2,
        gist_min_text_len=4, gist_max_text_len=32, axes_dims=(4, 6, 6), axes_lens=(64, 32, 32),
    )  # fmt: skip
    parts = dict(transformer=transformer, scheduler=euler(), vae=vae(4, AutoencoderKLFlux2))
    return BriaFibo2Pipeline(**parts, text_encoder=None, processor=None)


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES.bool(), negative_prompt_embeds_mask=ONES.bool())
    return sample(pipe, steps, seed, **prompts(1, 2, WORDS, WIDTH), **masks, guidance_scale=3.0, **SIZE)
