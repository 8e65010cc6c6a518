"""Allegro: ancestral Euler on noise prediction, no flow: computed exactly."""

from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

from .base import ONES, SIZE, WIDTH, no_text, prompts, random, sample

EXACT = "sigma"


def pipe():
    transformer = random(
        AllegroTransformer3DModel, num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48,
        caption_channels=WIDTH, sample_width=8, sample_height=8, sample_frames=3,
    )  # fmt: skip
    vae = random(AutoencoderKLAllegro, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, sample_size=64)
    return AllegroPipeline(transformer=transformer, vae=vae, scheduler=EulerAncestralDiscreteScheduler(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    shape = dict(num_frames=9, clean_caption=False, **SIZE)
    return sample(pipe, steps, seed, **prompts(), **masks, negative_prompt=None, guidance_scale=3.0, **shape)
