"""WAN Animate 2, a modular pipeline: segment after segment, a schedule for each. The first call of a segment fills a cache of keys and
values from the driving video; the two branches of a step differ in a switch."""

import shutil

import pytest
from diffusers import WanAnimate2ModularPipeline, WanAnimate2Transformer3DModel
from diffusers.modular_pipelines import WanAnimate2Blocks
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import wan
from .base import WIDTH, WORDS, calm, euler, film, picture, prompts, random, rnd
from .base_modular import modular, sample_modular

CHUNKS = 2
EYE = 1280  # channels of the picture's embedding, fixed in the transformer


def pipe():
    if shutil.which("g++") is None:
        pytest.skip("its attention is compiled: it needs a C++ compiler")
    transformer = random(
        WanAnimate2Transformer3DModel, text_len=WORDS, dim=32, ffn_dim=64, freq_dim=32, text_dim=WIDTH, num_heads=2, num_layers=2
    )
    calm(transformer.time_embedding)
    config = CLIPVisionConfig(
        hidden_size=EYE, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=112
    )
    parts = dict(transformer=transformer, vae=wan.vae(), scheduler=euler(), image_encoder=random(CLIPVisionModel, config=config))
    return modular(WanAnimate2ModularPipeline, WanAnimate2Blocks(), **parts)


def call(pipe, steps, seed):
    texts = dict(**prompts(), prompt_ref_embeds=rnd(1, WORDS, WIDTH, seed=9))
    video = dict(image=picture(), driving_video=film(17), segment_frame_length=9, prev_segment_conditioning_frames=1)
    frames = sample_modular(pipe, steps, seed, ("segment_frames",), **texts, **video, height=64, width=64)
    return [(x - x.mean()) / x.std() for x in frames]  # those of a random decoder are nearly grey
