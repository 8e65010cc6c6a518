"""Lucy Edit: WAN 2.2's 5B transformer with the latents of the given video as more channels."""

from diffusers import LucyEditPipeline

from . import wan
from .base import film


def pipe():
    return LucyEditPipeline(**(wan.parts() | dict(transformer=wan.transformer(in_channels=32))), expand_timesteps=True)


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, video=film())
