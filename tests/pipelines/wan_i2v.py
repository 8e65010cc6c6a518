"""WAN 2.2 image to video: two experts of 36 channels in turn, switched at a part of the schedule."""

from diffusers import WanImageToVideoPipeline

from . import wan
from .base import picture


def pipe():
    parts = wan.parts()
    experts = dict(transformer=wan.transformer(in_channels=36), transformer_2=wan.transformer(in_channels=36, seed=1))
    return WanImageToVideoPipeline(**(parts | experts), image_encoder=None, image_processor=None, boundary_ratio=0.875)


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, image=picture())
