"""LTX-Video: both branches as one batch, in one cache context."""

from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

from .base import HEADS, ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, slow


def pipe():
    transformer = slow(
        random(
            LTXVideoTransformer3DModel, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH, **HEADS
        )
    )
    vae = random(
        AutoencoderKLLTXVideo, latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    return LTXPipeline(transformer=transformer, vae=vae, scheduler=euler(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, num_frames=9, **SIZE)
