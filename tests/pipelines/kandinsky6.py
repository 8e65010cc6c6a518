"""Kandinsky 6 text to video and audio: one call makes both, by two copies of one scheduler; contexts ``cond`` and ``uncond``."""

from diffusers import Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel, MMAudioVAE, MMAudioVocoder

from . import hunyuanvideo
from .base import SIZE, WIDTH, euler, no_text, prompts, random, rnd, sample, slow

CLIP = 16


def pipe():
    transformer = slow(random(
        Kandinsky6Transformer3DModel, in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=CLIP, time_dim=16, model_dim=32,
        ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), in_audio_dim=8, out_audio_dim=8, model_dim_a=32,
        time_dim_a=16, ff_dim_a=64, axes_dims_a=(32,),
    ))  # fmt: skip
    sound = random(
        MMAudioVAE, mel_bins=8, latent_channels=8, hidden_channels=8, layers_per_block=1, sample_rate=1600, n_fft=64, hop_length=16
    )
    horn = random(MMAudioVocoder, num_mels=8, upsample_initial_channel=8, upsample_rates=(4, 4), upsample_kernel_sizes=(8, 8))
    parts = dict(transformer=transformer, vae=hunyuanvideo.vae(), audio_vae=sound, vocoder=horn, scheduler=euler())
    return Kandinsky6TI2VAPipeline(**parts, **no_text(2))


def call(pipe, steps, seed):
    pooled = dict(pooled_prompt_embeds=rnd(1, CLIP), negative_pooled_prompt_embeds=rnd(1, CLIP, seed=8))
    return sample(pipe, steps, seed, **prompts(), **pooled, guidance_scale=3.0, num_frames=9, **SIZE)
