"""Chroma from a picture: the schedule is cut, so the first step is not the scheduler's first."""

from diffusers import ChromaImg2ImgPipeline

from . import chroma
from .base import picture


def pipe():
    return ChromaImg2ImgPipeline(**chroma.parts())


def call(pipe, steps, seed):
    return chroma.call(pipe, steps, seed, image=picture(), strength=0.75)
