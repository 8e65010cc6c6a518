"""GLM-Image: before the loop a call at time 0 for each given picture fills a cache that the guided branch reads; two calls a step."""

import torch
from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

from .base import HEADS, SIZE, WIDTH, WORDS, euler, picture, prompts, random, sample, vae

TOKENS = 16  # of a picture of 64 pixels: 8 a token in the latent, 2 a patch


def pipe(**over):
    transformer = random(
        GlmImageTransformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, time_embed_dim=32,
        condition_dim=8, prior_vq_quantizer_codebook_size=64, **{**HEADS, **over},
    )  # fmt: skip
    parts = dict(transformer=transformer, vae=vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), scheduler=euler())
    return GlmImagePipeline(**parts, tokenizer=None, processor=None, text_encoder=None, vision_language_encoder=None)


def call(pipe, steps, seed):
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    prior = dict(prior_token_ids=ids[:1], prior_token_image_ids=[ids[1]], source_image_grid_thw=[torch.tensor([[1, 4, 4]])])
    return sample(pipe, steps, seed, **prompts(1, WORDS, WIDTH), **prior, image=[picture()], guidance_scale=3.0, **SIZE)
