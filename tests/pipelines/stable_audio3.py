"""Stable Audio 3: latent and time come by position, both branches as one batch; a schedule of its own, even in log SNR."""

from diffusers import AutoencoderSAME, StableAudio3DiTModel, StableAudio3Pipeline
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from .base import ONES, WIDTH, euler, no_text, prompts, random, sample


def pipe():
    transformer = random(
        StableAudio3DiTModel, io_channels=8, embed_dim=32, depth=2, num_heads=2, cond_token_dim=WIDTH, global_cond_dim=WIDTH,
        local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
    )  # fmt: skip
    vae = random(
        AutoencoderSAME, audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=8, use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=32,
    )  # fmt: skip
    duration = random(StableAudio3DurationEmbedder, output_dim=WIDTH, fourier_dim=16)
    scheduler = euler(shift=1.0, num_train_timesteps=1)
    return StableAudio3Pipeline(transformer=transformer, vae=vae, duration_embedder=duration, scheduler=scheduler, **no_text())


def call(pipe, steps, seed):
    masks = dict(encoder_attention_mask=ONES, negative_encoder_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, duration=4.0)
