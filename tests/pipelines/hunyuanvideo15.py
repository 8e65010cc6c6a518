"""HunyuanVideo 1.5: a guider object makes the calls of a step, contexts ``pred_cond`` and ``pred_uncond``."""

from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel

from .base import HEADS, ONES, WIDTH, WORDS, euler, no_text, random, rnd, sample, slow


def transformer():
    return slow(random(
        HunyuanVideo15Transformer3DModel, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1,
        patch_size_t=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16,
        task_type="t2v", **HEADS,
    ))  # fmt: skip


def vae():
    return random(
        AutoencoderKLHunyuanVideo15, latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip


def texts():
    found = {}
    for name, seed in (("prompt_embeds", 7), ("negative_prompt_embeds", 8)):
        found |= {name: rnd(1, WORDS, WIDTH, seed=seed), f"{name}_2": rnd(1, WORDS, WIDTH, seed=seed + 9)}
        found |= {f"{name}_mask": ONES, f"{name}_mask_2": ONES}
    return found


def pipe():
    guider = ClassifierFreeGuidance(guidance_scale=4.0)
    return HunyuanVideo15Pipeline(transformer=transformer(), vae=vae(), scheduler=euler(), guider=guider, **no_text(2))


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **texts(), num_frames=9, height=32, width=32)
