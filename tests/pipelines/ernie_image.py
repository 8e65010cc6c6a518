"""ERNIE-Image: one batch; the time is in thousandths; the prompts come as a list of their own lengths."""

from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel

from .base import SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae


def pipe():
    transformer = random(
        ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16,
        out_channels=16, patch_size=1, text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return ErnieImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(4, AutoencoderKLFlux2), **no_text())


def call(pipe, steps, seed):
    text = dict(prompt_embeds=[rnd(WORDS, WIDTH)], negative_prompt_embeds=[rnd(WORDS - 2, WIDTH, seed=8)])
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, **SIZE)
