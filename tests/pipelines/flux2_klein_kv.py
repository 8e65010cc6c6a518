"""FLUX.2 Klein-KV: the first call returns the keys and values of the picture beside its output, the later ones read them."""

from diffusers import Flux2KleinKVPipeline

from . import flux2
from .base import SIZE, WIDTH, WORDS, picture, rnd, sample

FAST = True


def pipe(**over):
    return Flux2KleinKVPipeline(**flux2.parts(guidance_embeds=False, **over), is_distilled=True)


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, prompt_embeds=rnd(1, WORDS, WIDTH), image=picture(), **SIZE)
