"""WAN VACE: a control video, and blocks of their own that read it."""

from diffusers import WanVACEPipeline, WanVACETransformer3DModel

from . import wan
from .base import film


def pipe():
    control = wan.transformer(WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96)
    return WanVACEPipeline(**(wan.parts() | dict(transformer=control)))


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, video=film())
