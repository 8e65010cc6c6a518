"""ACE-Step: music; times from 1 to 0, both branches as one batch, guided in the middle of the schedule alone. With latents as output
the pipeline does not say that it is over."""

from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

from .base import WIDTH, euler, random, sample
from .base_text import LETTERS, tokenizer

QWEN = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
SIDE = dict(hidden_size=WIDTH, intermediate_size=64, **QWEN)


def oobleck():
    return random(
        AutoencoderOobleck, encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=8,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=50,
    )  # fmt: skip


def pipe():
    transformer = random(
        AceStepTransformer1DModel, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=16, **SIDE
    )
    condition = random(
        AceStepConditionEncoder, text_hidden_dim=WIDTH, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, sliding_window=16, **SIDE,
    )  # fmt: skip
    text = random(Qwen3Model, config=Qwen3Config(num_hidden_layers=1, vocab_size=LETTERS, **SIDE))
    parts = dict(transformer=transformer, condition_encoder=condition, vae=oobleck(), text_encoder=text, tokenizer=tokenizer())
    return AceStepPipeline(**parts, scheduler=euler(shift=1.0, num_train_timesteps=1))


def call(pipe, steps, seed):
    guided = dict(guidance_scale=3.0, cfg_interval_start=0.2, cfg_interval_end=0.9)
    return sample(pipe, steps, seed, prompt="piano", lyrics="soft notes", audio_duration=1.0, **guided)
