"""Bria Fibo: the hidden states of the language model's layers go to the blocks; one batch."""

from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel

from .base import HEADS, WIDTH, euler, random, sample, vae
from .base_text import language_model, tokenizer


def pipe():
    transformer = random(
        BriaFiboTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH, axes_dims_rope=[4, 6, 6], **HEADS,
    )  # fmt: skip
    text = dict(text_encoder=language_model("SmolLM3"), tokenizer=tokenizer())
    return BriaFiboPipeline(transformer=transformer, scheduler=euler(), vae=vae(), **text)


def call(pipe, steps, seed):
    text = dict(prompt="a blue cup", negative_prompt="fog in a wood")
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, height=128, width=128)
