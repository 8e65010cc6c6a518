"""Qwen-Image 2.1: the first step returns a cache of the text's keys and values, which the later ones read; no guidance as shipped."""

from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from transformers.processing_utils import ProcessorMixin

from .base import HEADS, ONES, WIDTH, WORDS, euler, random, rnd, sample
from .base_text import tokenizer

FAST = True


class Processor(ProcessorMixin):
    """Of text alone. The pipeline asks it for the length of its own system prompt; Qwen3-VL's needs torchvision."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)

    def __call__(self, text=None, **options):
        return self.tokenizer([text] if isinstance(text, str) else text, **options)


def pipe(**over):
    transformer = random(
        QwenImage21Transformer2DModel, patch_size=1, in_channels=8, out_channels=8, num_layers=2, context_in_dim=WIDTH, mlp_ratio=2,
        **{"axes_dims_rope": (4, 6, 6), **HEADS, **over},
    )  # fmt: skip
    vae = random(
        AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )  # fmt: skip
    parts = dict(transformer=transformer, vae=vae, scheduler=euler())
    return QwenImage21Pipeline(**parts, text_encoder=None, processor=Processor(tokenizer()))


def call(pipe, steps, seed):
    text = dict(prompt_embeds=rnd(1, WORDS, WIDTH), prompt_embeds_mask=ONES.bool())
    return sample(pipe, steps, seed, **text, height=128, width=128)
