"""Krea 2: ``timestep`` is sigma, two calls a step without a context; the prompt has a row for each layer of its encoder."""

from diffusers import Krea2Pipeline, Krea2Transformer2DModel

from . import qwenimage
from .base import ONES, SIZE, WIDTH, WORDS, euler, no_text, prompts, random, sample

LAYERS = 3


def pipe():
    transformer = random(
        Krea2Transformer2DModel, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=WIDTH, num_text_layers=LAYERS, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=64, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return Krea2Pipeline(transformer=transformer, scheduler=euler(), vae=qwenimage.parts()["vae"], **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES.bool(), negative_prompt_embeds_mask=ONES.bool())
    return sample(pipe, steps, seed, **prompts(1, WORDS, LAYERS, WIDTH), **masks, guidance_scale=3.0, **SIZE)
