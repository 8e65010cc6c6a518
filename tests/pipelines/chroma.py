"""Chroma: two calls a step and no cache context to tell them apart; ``timestep`` is sigma."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel

from .base import HEADS, ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae

FAST = True


def parts():
    transformer = random(
        ChromaTransformer2DModel, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
        axes_dims_rope=[4, 6, 6], approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16, **HEADS,
    )  # fmt: skip
    waves = transformer.distilled_guidance_layer.in_proj.weight[:, :4]  # of the time: two cosines and two sines, the fast one first
    waves[:, ::2] = 0  # as ``base.slow`` does: it turns many times between two steps
    return dict(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def pipe():
    return ChromaPipeline(**parts())


def call(pipe, steps, seed, **over):
    masks = dict(prompt_attention_mask=ONES.bool(), negative_prompt_attention_mask=ONES.bool())
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, **SIZE, **over)
