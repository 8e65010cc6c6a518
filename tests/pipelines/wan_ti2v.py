"""WAN 2.2 TI2V-5B: ``timestep`` holds a value for each token, zero for those of the given picture."""

from diffusers import WanImageToVideoPipeline

from . import wan
from .base import picture


def pipe():
    vae = wan.vae(
        in_channels=12, out_channels=12, is_residual=True, patch_size=2, latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
        scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip
    parts = wan.parts() | dict(vae=vae, image_encoder=None, image_processor=None)
    return WanImageToVideoPipeline(**parts, expand_timesteps=True)


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, image=picture())
