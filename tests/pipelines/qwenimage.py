"""Qwen-Image: two calls a step, named by the cache contexts ``cond`` and ``uncond``; ``timestep`` is sigma."""

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from .base import HEADS, ONES, SIZE, euler, no_text, prompts, random, sample

FAST = True


def parts():
    transformer = random(
        QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4), **HEADS,
    )  # fmt: skip
    vae = random(
        AutoencoderKLQwenImage, base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return dict(transformer=transformer, vae=vae, scheduler=euler(), **no_text())


def pipe():
    return QwenImagePipeline(**parts())


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES, negative_prompt_embeds_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, true_cfg_scale=3.0, **SIZE)
