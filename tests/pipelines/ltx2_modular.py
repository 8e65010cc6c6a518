"""LTX-2 as a modular pipeline: two guiders, one for video and one for audio, share the calls of a step, each in its context."""

import torch
from diffusers import LTX2Guidance, LTX2ModularPipeline
from diffusers.modular_pipelines import LTX2AutoBlocks

from . import ltx2
from .base import WIDTH, prompts
from .base_modular import modular, sample_modular
from .base_text import tokenizer

SHAPE = dict(height=128, width=128, num_frames=17, frame_rate=25.0)  # a token each 32 pixels and 8 frames


def pipe():
    guide = lambda **config: LTX2Guidance(guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0, **config)
    guiders = dict(guider=guide(spatio_temporal_guidance_blocks=[1]), audio_guider=guide())
    return modular(LTX2ModularPipeline, LTX2AutoBlocks().get_workflow("text2video"), **ltx2.parts(), **guiders, tokenizer=tokenizer())


def call(pipe, steps, seed):
    mask = torch.ones(1, ltx2.WORDS, dtype=torch.long)
    texts = dict(**prompts(1, ltx2.WORDS, ltx2.LAYERS * WIDTH), prompt_attention_mask=mask, negative_prompt_attention_mask=mask)
    return sample_modular(pipe, steps, seed, ("latents", "audio_latents"), **texts, batch_size=1, dtype=torch.float32, **SHAPE)
