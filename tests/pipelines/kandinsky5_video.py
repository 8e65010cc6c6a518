"""Kandinsky 5 text to video: channels last, two calls a step, contexts ``cond`` and ``uncond``."""

import torch
from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

from . import hunyuanvideo
from .base import SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample

CLIP = 16


def pipe():
    transformer = random(
        Kandinsky5Transformer3DModel, in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=CLIP, time_dim=16, model_dim=32,
        ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return Kandinsky5T2VPipeline(transformer=transformer, vae=hunyuanvideo.vae(), scheduler=euler(), **no_text(2))


def call(pipe, steps, seed):
    texts = {}
    for name, number in (("", 7), ("negative_", 8)):
        texts |= {f"{name}prompt_embeds_qwen": rnd(1, WORDS, WIDTH, seed=number), f"{name}prompt_embeds_clip": rnd(1, CLIP, seed=number)}
        texts |= {f"{name}prompt_cu_seqlens": torch.tensor([0, WORDS], dtype=torch.int32)}
    return sample(pipe, steps, seed, **texts, guidance_scale=3.0, num_frames=9, **SIZE)
