"""Mochi: both branches as one batch, in one cache context; sigmas that rise from 0 to 1."""

from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

from .base import ONES, WIDTH, WORDS, euler, no_text, prompts, random, sample, slow


def pipe():
    transformer = slow(random(
        MochiTransformer3DModel, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=WIDTH, time_embed_dim=16, max_sequence_length=WORDS,
    ))  # fmt: skip
    vae = random(AutoencoderKLMochi, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    return MochiPipeline(transformer=transformer, vae=vae, scheduler=euler(shift=1.0, invert_sigmas=True), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES.bool(), negative_prompt_attention_mask=ONES.bool())
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, num_frames=7, height=32, width=32)
