"""ChronoEdit: WAN image to video that edits the picture; no cache context."""

from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel

from . import wan
from .base import picture


def pipe():
    transformer = wan.transformer(ChronoEditTransformer3DModel, in_channels=36, image_dim=4)
    return ChronoEditPipeline(**(wan.parts() | dict(transformer=transformer, **wan.eye())))


def call(pipe, steps, seed, **inputs):
    return wan.call(pipe, steps, seed, image=picture(), **inputs)
