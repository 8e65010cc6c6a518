"""Helios: chunk after chunk of a long video, a schedule for each; contexts ``cond`` and ``uncond``."""

from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

from . import wan
from .base import HEADS, WIDTH, random, slow

CHUNKS = 2


def pipe():
    transformer = slow(
        random(
            HeliosTransformer3DModel,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            cross_attn_norm=True,
            rope_dim=(4, 6, 6),
            **HEADS,
        )
    )
    scheduler = HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return HeliosPipeline(**(wan.parts() | dict(transformer=transformer, scheduler=scheduler)))


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, num_frames=18, num_latent_frames_per_chunk=3)
