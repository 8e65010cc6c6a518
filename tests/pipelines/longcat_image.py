"""LongCat-Image: two calls a step, named by the cache context; the pipeline renormalises the guided output."""

from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

from .base import HEADS, SIZE, WIDTH, euler, random, sample, vae
from .base_text import language_model, tokenizer


def pipe():
    transformer = random(
        LongCatImageTransformer2DModel, patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6], **HEADS,
    )  # fmt: skip
    text = dict(text_encoder=language_model(), tokenizer=tokenizer(), text_processor=None)
    made = LongCatImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(16), **text)
    made.tokenizer_max_length = 16
    return made


def call(pipe, steps, seed):
    text = dict(prompt="a blue cup", negative_prompt="fog", enable_prompt_rewrite=False)
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, **SIZE)
