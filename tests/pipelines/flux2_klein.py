"""FLUX.2 Klein, base model: two calls a step, named by the cache context."""

from diffusers import Flux2KleinPipeline

from . import flux2
from .base import SIZE, prompts, sample


def pipe():
    return Flux2KleinPipeline(**flux2.parts(guidance_embeds=False), is_distilled=False)


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=4.0, **SIZE)
