"""MiniMax-H3, a modular pipeline: one call makes video and audio, each by a schedule of its own, and ``timestep`` holds the times of
all rows, each once. No guidance. The scheduler counts the last zero as a step: N steps are N - 1 calls."""

import torch
from diffusers import MiniMaxH3ModularPipeline, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks

from .base import HEADS, WIDTH, WORDS, random, rnd
from .base_modular import modular, sample_modular

FAST = True
TEXT = 1  # the tag of a text row


def pipe():
    transformer = random(
        MiniMaxH3Transformer3DModel, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=64, text_dim=WIDTH, freq_dim=16,
        time_embed_hidden_dim=32, time_embed_dim=32, rope_freq_dim=2, **HEADS,
    )  # fmt: skip
    schedulers = dict(scheduler=MiniMaxH3Scheduler(shift=12.0), audio_scheduler=MiniMaxH3Scheduler(shift=3.0))
    return modular(MiniMaxH3ModularPipeline, MiniMaxH3Blocks().get_workflow("t2va"), transformer=transformer, **schedulers)


def call(pipe, steps, seed):
    text = dict(prompt_embeds=rnd(1, WORDS, WIDTH), text_token_tags=torch.full((WORDS,), TEXT))
    shape = dict(height=32, width=32, num_frames=124)  # the shortest that it makes
    return sample_modular(pipe, steps + 1, seed, ("latents", "audio_latents"), **text, **shape)
