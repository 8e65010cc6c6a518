"""Ideogram 4: the two branches of the guidance are two transformers; the time is 1 - sigma, the output negated by the pipeline."""

from diffusers import AutoencoderKLFlux2, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from transformers import Qwen3VLConfig, Qwen3VLModel

from .base import SIZE, euler, random, sample, vae
from .base_text import tokenizer


def transformer(seed):
    return random(
        Ideogram4Transformer2DModel, seed, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=64, adaln_dim=16, llm_features_dim=16 * len(QWEN3_VL_ACTIVATION_LAYERS), mrope_section=(4, 2, 2),
    )  # fmt: skip


def pipe():
    text = dict(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=36, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], mrope_interleaved=True),
    )  # fmt: skip
    eyes = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=16, deepstack_visual_indexes=[0])
    encoder = random(Qwen3VLModel, config=Qwen3VLConfig(text_config=text, vision_config=eyes))
    models = dict(transformer=transformer(0), unconditional_transformer=transformer(1), text_encoder=encoder)
    return Ideogram4Pipeline(**models, tokenizer=tokenizer(), scheduler=euler(1.0), vae=vae(4, AutoencoderKLFlux2))


def call(pipe, steps, seed):
    guidance = dict(guidance_scale=3.0, guidance_schedule=None)
    return sample(pipe, steps, seed, prompt="a blue cup", max_sequence_length=12, **guidance, **SIZE)
