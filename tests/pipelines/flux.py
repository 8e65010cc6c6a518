"""FLUX.1 with true guidance: two calls a step, named by the cache context; ``timestep`` is sigma."""

from diffusers import FluxPipeline, FluxTransformer2DModel

from .base import HEADS, SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae


def pipe():
    transformer = random(
        FluxTransformer2DModel, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    return FluxPipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text(2))


def call(pipe, steps, seed):
    text = {}
    for name, first in (("", 7), ("negative_", 8)):
        text[f"{name}prompt_embeds"] = rnd(1, WORDS, WIDTH, seed=first)
        text[f"{name}pooled_prompt_embeds"] = rnd(1, WIDTH, seed=first + 9)
    return sample(pipe, steps, seed, **text, true_cfg_scale=3.0, **SIZE)
