"""EasyAnimate 5.1: both branches as one batch, no context."""

from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline, EasyAnimateTransformer3DModel

from .base import HEADS, ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, slow


def pipe():
    transformer = slow(random(
        EasyAnimateTransformer3DModel, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2,
        sample_width=16, sample_height=16, patch_size=2, **HEADS,
    ))  # fmt: skip
    vae = random(
        AutoencoderKLMagvit, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False
    )
    return EasyAnimatePipeline(transformer=transformer, vae=vae, scheduler=euler(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, num_frames=5, **SIZE)
