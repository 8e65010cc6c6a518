"""SkyReels V2 diffusion forcing: ``timestep`` is 2-D, and each frame has a scheduler of its own that steps at its own calls."""

from diffusers import SkyReelsV2DiffusionForcingPipeline

from . import skyreels, wan

EXACT = "without a step of its scheduler"


def pipe():
    return SkyReelsV2DiffusionForcingPipeline(**skyreels.parts())


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed, prompt=None, num_frames=17, ar_step=2, causal_block_size=1, base_num_frames=17)
