"""Stable Audio 1: a solver on v-prediction with sigmas up to 80: computed exactly."""

from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline, StableAudioProjectionModel

from .ace_step import oobleck
from .base import ONES, WIDTH, prompts, random, sample
from .base_text import tokenizer

EXACT = "sigma"


def pipe():
    heads = dict(num_attention_heads=2, num_key_value_attention_heads=2, attention_head_dim=16)
    transformer = random(
        StableAudioDiTModel, sample_size=32, in_channels=8, out_channels=8, num_layers=2, cross_attention_dim=WIDTH, time_proj_dim=8,
        global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH, **heads,
    )  # fmt: skip
    projection = random(StableAudioProjectionModel, text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32)
    scheduler = EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    parts = dict(transformer=transformer, projection_model=projection, vae=oobleck(), scheduler=scheduler)
    return StableAudioPipeline(**parts, text_encoder=None, tokenizer=tokenizer())


def call(pipe, steps, seed):
    masks = dict(attention_mask=ONES, negative_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, audio_end_in_s=0.5)
