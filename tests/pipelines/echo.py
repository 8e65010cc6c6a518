"""Echo, a modular pipeline without a scheduler: LTX-2's transformer by a list of sigmas, with fresh noise after each step: computed
exactly."""

import numpy as np
import torch
from diffusers import EchoBlocks, EchoModularPipeline

from . import ltx2
from .base import WIDTH, rnd
from .base_modular import modular, sample_modular

EXACT = "has no scheduler"
SHAPE = dict(height=16, width=16, num_frames=9, frame_rate=25.0)


def pipe():
    return modular(EchoModularPipeline, EchoBlocks(), **ltx2.parts())


def call(pipe, steps, seed):
    text = {f"connector_{kind}prompt_embeds": rnd(1, ltx2.WORDS, WIDTH) for kind in ("", "audio_")}
    mask = dict(connector_attention_mask=torch.ones(1, ltx2.WORDS, dtype=torch.long))
    sigmas = [*np.linspace(1.0, 0.1, steps).tolist(), 0.0]
    return sample_modular(pipe, None, seed, ("latents", "audio_latents"), **text, **mask, **SHAPE, sigmas=sigmas)
