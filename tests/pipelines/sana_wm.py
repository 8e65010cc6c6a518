"""Sana WM: a world model that a camera path steers. Latent, time and text come by position, a time for each frame."""

import numpy as np
from diffusers import SanaWMPipeline, SanaWMTransformer3DModel

from . import ltx2
from .base import ONES, WIDTH, euler, no_text, picture, prompts, random, sample, slow

FRAMES = 9


def pipe():
    vae = ltx2.video_vae()
    transformer = slow(random(
        SanaWMTransformer3DModel, in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, linear_head_dim=16, softmax_every_n=2,
        chunk_plucker_channels=6 * vae.temporal_compression_ratio, chunk_plucker_post_attn_blocks=2, caption_channels=WIDTH,
    ))  # fmt: skip
    return SanaWMPipeline(transformer=transformer, vae=vae, scheduler=euler(), **no_text())


def call(pipe, steps, seed):
    path = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    path[:, 2, 3] = np.linspace(0, 1, FRAMES)
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    camera = dict(c2w=path, intrinsics=[32.0, 32.0, 16.0, 16.0], num_frames=FRAMES, height=16, width=16)
    return sample(pipe, steps, seed, image=picture(), prompt="", **prompts(), **masks, **camera, guidance_scale=3.0)[:1]
