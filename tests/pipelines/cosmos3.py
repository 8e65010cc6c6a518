"""Cosmos 3: no hidden states but lists of tokens, a list of tensors out; the text goes in as token numbers. The contexts tell step,
sigma and the number of steps."""

from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer

from . import wan
from .base import SIZE, random, sample, unipc
from .base_text import LETTERS, tokenizer


def pipe():
    transformer = random(
        Cosmos3OmniTransformer, head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=16, latent_patch_size=2,
        patch_latent_dim=64, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, rope_axes_dim=[4, 2, 2],
        vocab_size=LETTERS + 2, dtype="float32",
    )  # fmt: skip
    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    text.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    parts = dict(transformer=transformer, vae=wan.vae(), scheduler=unipc(), text_tokenizer=text)
    return Cosmos3OmniPipeline(**parts, enable_safety_checker=False)


def call(pipe, steps, seed):
    plain = dict(use_system_prompt=False, add_resolution_template=False, add_duration_template=False)
    return sample(pipe, steps, seed, prompt="a dog", negative_prompt="blurred", guidance_scale=3.0, num_frames=9, **plain, **SIZE)
