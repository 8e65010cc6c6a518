"""FLUX.2 dev: guidance is an embedding, one call a step."""

from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel

from .base import HEADS, SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae

FAST = True


def parts(**over):
    transformer = random(
        Flux2Transformer2DModel, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH,
        timestep_guidance_channels=32, **{"axes_dims_rope": (4,) * 4, **HEADS, **over},
    )  # fmt: skip
    return dict(transformer=transformer, scheduler=euler(1.0), vae=vae(4, AutoencoderKLFlux2), **no_text())


def pipe():
    return Flux2Pipeline(**parts())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, prompt_embeds=rnd(1, WORDS, WIDTH), **SIZE)
