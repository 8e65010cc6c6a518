"""FLUX.3, a modular pipeline: a guider, two calls a step without a context; ``timestep`` is sigma."""

from diffusers import ClassifierFreeGuidance, Flux3ModularPipeline, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep

from .base import HEADS, SIZE, WIDTH, euler, prompts, random
from .base_modular import modular, sample_modular


def transformer(**over):
    return random(
        Flux3Transformer2DModel, in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=WIDTH,
        timestep_channels=32, axes_dims_rope=(4,) * 4, **HEADS, **over,
    )  # fmt: skip


def pipe():
    parts = dict(transformer=transformer(), scheduler=euler(6.93), guider=ClassifierFreeGuidance(guidance_scale=3.5))
    return modular(Flux3ModularPipeline, Flux3CoreDenoiseStep(), **parts)


def call(pipe, steps, seed):
    return sample_modular(pipe, steps, seed, **prompts(), **SIZE)
