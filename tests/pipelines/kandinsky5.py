"""Kandinsky 5, pictures: two calls a step without a context, the latent's last axis is its channels."""

import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

from .base import SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae


def pipe():
    transformer = random(
        Kandinsky5Transformer3DModel, in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=32, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    made = Kandinsky5T2IPipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text(2))
    made.resolutions = [(64, 64)]  # other sizes are changed to the nearest of these
    return made


def call(pipe, steps, seed):
    lengths = torch.tensor([0, WORDS], dtype=torch.int32)
    text = dict(prompt_cu_seqlens=lengths, negative_prompt_cu_seqlens=lengths)
    for name, first in (("", 7), ("negative_", 8)):
        text[f"{name}prompt_embeds_qwen"] = rnd(1, WORDS, WIDTH, seed=first)
        text[f"{name}prompt_embeds_clip"] = rnd(1, WIDTH, seed=first + 9)
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, **SIZE)
