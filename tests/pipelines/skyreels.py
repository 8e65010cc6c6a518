"""SkyReels V2: WAN's layout and contexts, UniPC."""

from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

from . import wan


def parts():
    return wan.parts() | dict(transformer=wan.transformer(SkyReelsV2Transformer3DModel))


def pipe():
    return SkyReelsV2Pipeline(**parts())


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed)
