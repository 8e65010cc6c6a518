"""MiniMax Music 3, a modular pipeline: window after window, a schedule for each, each begun with the end of the one before. Times rise
from 0, noise, to 1; a guider makes two calls a step without a context."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    MiniMaxMusic3ConditionEncoder,
    MiniMaxMusic3ModularPipeline,
    MiniMaxMusic3Transformer1DModel,
)
from diffusers.modular_pipelines.minimax_music3.modular_blocks_minimax_music3 import MiniMaxMusic3CoreDenoiseStep

from .base import HEADS, WIDTH, random, rnd
from .base_modular import modular, sample_modular

CHUNKS = 2
FRAMES = 300  # of the language model; a window has 200


def pipe():
    transformer = random(
        MiniMaxMusic3Transformer1DModel, in_channels=8, condition_dim=WIDTH, num_layers=2, ff_inner_dim=64, rotary_dim=8,
        fourier_embedding_dim=16, **HEADS,
    )  # fmt: skip
    condition = random(MiniMaxMusic3ConditionEncoder, condition_hidden_dim=4, num_condition_layers=8, out_dim=WIDTH)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, invert_sigmas=True)
    parts = dict(transformer=transformer, condition_encoder=condition, scheduler=scheduler)
    return modular(MiniMaxMusic3ModularPipeline, MiniMaxMusic3CoreDenoiseStep(), **parts)


def call(pipe, steps, seed):
    return sample_modular(pipe, steps, seed, ("latent_chunks",), frame_hiddens=rnd(1, FRAMES, 32))
