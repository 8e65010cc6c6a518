"""LTX-2: one call makes video and audio; both branches as one batch."""

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .base import WIDTH, euler, no_text, prompts, random, sample, slow

FAST = True
WORDS, LAYERS = 8, 3  # tokens of a prompt, and layers of the text encoder whose states are its embedding
SHAPE = dict(height=32, width=32, num_frames=5, frame_rate=25.0)


TRANSFORMER = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
    audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
    caption_channels=WIDTH, rope_double_precision=False, rope_type="split",
)  # fmt: skip
CONNECTOR = dict(num_attention_heads=4, attention_head_dim=8, num_layers=1, num_learnable_registers=None)


def connectors(layers):
    """What adapts the hidden states of so many layers of a text encoder to video and to audio."""
    sides = {f"{side}_connector_{name}": value for side in ("video", "audio") for name, value in CONNECTOR.items()}
    return random(
        LTX2TextConnectors, caption_channels=WIDTH, text_proj_in_factor=layers, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split", **sides,
    )  # fmt: skip


def parts():
    models = dict(transformer=slow(random(LTX2VideoTransformer3DModel, **TRANSFORMER)), connectors=connectors(LAYERS))
    return dict(**models, vae=video_vae(), audio_vae=audio_vae(), vocoder=vocoder(), scheduler=euler())


def video_vae():
    return random(
        AutoencoderKLLTX2Video, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip


def audio_vae():
    return random(
        AutoencoderKLLTX2Audio, base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0, mid_block_add_attention=False,
        sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip


def vocoder():
    return random(
        LTX2Vocoder, in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], leaky_relu_negative_slope=0.1, output_sampling_rate=16000,
    )  # fmt: skip


def pipe():
    return LTX2Pipeline(**parts(), **no_text(), processor=None)


def call(pipe, steps, seed, **guidance):
    mask = torch.ones(1, WORDS, dtype=torch.long)
    texts = dict(**prompts(1, WORDS, LAYERS * WIDTH), prompt_attention_mask=mask, negative_prompt_attention_mask=mask)
    plain = dict(
        guidance_scale=3.0, audio_guidance_scale=3.0, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0,
        spatio_temporal_guidance_blocks=None, use_cross_timestep=False,
    )  # fmt: skip
    return sample(pipe, steps, seed, **texts, **(plain | guidance), **SHAPE)
