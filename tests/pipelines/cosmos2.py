"""Cosmos-Predict 2: sigmas up to 80, no flow schedule from 0 to 1: computed exactly."""

from diffusers import Cosmos2VideoToWorldPipeline

from . import cosmos25, wan
from .base import euler, picture, prompts, sample

EXACT = "no flow-matching schedule"


def pipe():
    return Cosmos2VideoToWorldPipeline(**(cosmos25.parts() | dict(scheduler=euler(shift=1.0, use_karras_sigmas=True))))


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=3.0, image=picture(), **wan.FRAMES)
