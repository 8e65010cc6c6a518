"""HunyuanVideo 1.0: guidance as an embedding, and true guidance as a second call; contexts ``cond`` and ``uncond``."""

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from .base import HEADS, ONES, SIZE, WIDTH, euler, no_text, prompts, random, rnd, sample, slow

POOLED = 8


def vae():
    return random(
        AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip


def transformer(build=HunyuanVideoTransformer3DModel, **config):
    return slow(random(
        build, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=WIDTH, pooled_projection_dim=POOLED, rope_axes_dim=(4, 6, 6), **HEADS, **config,
    ))  # fmt: skip


def parts():
    return dict(transformer=transformer(), vae=vae(), scheduler=euler(), **no_text(2))


def texts():
    more = {f"{name}_attention_mask": ONES for name in ("prompt", "negative_prompt")}
    return dict(**prompts(), **more, pooled_prompt_embeds=rnd(1, POOLED), negative_pooled_prompt_embeds=rnd(1, POOLED, seed=8))


def pipe():
    return HunyuanVideoPipeline(**parts())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **texts(), true_cfg_scale=3.0, num_frames=9, **SIZE)
