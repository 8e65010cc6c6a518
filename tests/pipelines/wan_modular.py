"""WAN as a modular pipeline: a guider makes two calls a step, without a cache context; nobody says when a run is over."""

from diffusers import WanModularPipeline
from diffusers.modular_pipelines import WanBlocks

from . import wan
from .base import prompts, unipc
from .base_modular import modular, sample_modular


def pipe():
    return modular(WanModularPipeline, WanBlocks(), transformer=wan.transformer(), scheduler=unipc())


def call(pipe, steps, seed, **inputs):
    return sample_modular(pipe, steps, seed, **prompts(), **(wan.FRAMES | inputs))
