"""Sana Video: both branches as one batch, no context; DPM++ on flow sigmas."""

from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel

from . import wan
from .base import ONES, SIZE, WIDTH, no_text, prompts, random, sample, slow


def pipe():
    transformer = slow(random(
        SanaVideoTransformer3DModel, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH, sample_size=8, rope_max_seq_len=32,
    ))  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaVideoPipeline(transformer=transformer, vae=wan.vae(), scheduler=scheduler, **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    size = dict(frames=9, use_resolution_binning=False, **SIZE)
    return sample(pipe, steps, seed, **prompts(), **masks, negative_prompt=None, guidance_scale=3.0, **size)
