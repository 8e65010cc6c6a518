"""FLUX.3 distilled, a flow map: each call names the time that it jumps to; no guider."""

from diffusers import Flux3DistilledModularPipeline
from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledCoreDenoiseStep

from . import flux3
from .base import SIZE, WIDTH, WORDS, euler, rnd
from .base_modular import modular, sample_modular


def pipe():
    parts = dict(transformer=flux3.transformer(flow_map=True), scheduler=euler(6.93))
    return modular(Flux3DistilledModularPipeline, Flux3DistilledCoreDenoiseStep(), **parts)


def call(pipe, steps, seed):
    return sample_modular(pipe, steps, seed, prompt_embeds=rnd(1, WORDS, WIDTH), **SIZE)
