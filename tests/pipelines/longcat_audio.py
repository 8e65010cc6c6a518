"""LongCat AudioDiT: two calls a step without a context, ``timestep`` is sigma; the text goes through an encoder."""

from diffusers import LongCatAudioDiTPipeline, LongCatAudioDiTTransformer, LongCatAudioDiTVae
from transformers import UMT5Config, UMT5EncoderModel

from .base import WIDTH, calm, random, sample
from .base_text import LETTERS, tokenizer


def pipe():
    transformer = random(
        LongCatAudioDiTTransformer, dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    calm(transformer.time_embed)
    vae = random(
        LongCatAudioDiTVae, in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=2, sample_rate=32,
    )  # fmt: skip
    text = random(UMT5EncoderModel, config=UMT5Config(d_model=WIDTH, num_layers=1, num_heads=2, d_kv=16, d_ff=64, vocab_size=LETTERS))
    return LongCatAudioDiTPipeline(transformer=transformer, vae=vae, text_encoder=text, tokenizer=tokenizer())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, prompt="soft waves", audio_duration_s=4.0, guidance_scale=3.0)
