"""Sana: DPM-Solver++ on a flow; the time is multiplied by ``timestep_scale``; one batch."""

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from .base import HEADS, ONES, SIZE, WIDTH, no_text, prompts, random, sample


def parts(**over):
    transformer = random(
        SanaTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH, sample_size=32, **HEADS, **over,
    )  # fmt: skip
    vae = random(
        AutoencoderDC, in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return dict(transformer=transformer, vae=vae, **no_text())


def pipe():
    dpm = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(**parts(), scheduler=dpm)


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES, negative_prompt=None)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, use_resolution_binning=False, **SIZE)
