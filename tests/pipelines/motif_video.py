"""Motif Video: a guider of adaptive projection makes the calls of a step, each in its context."""

from diffusers import AdaptiveProjectedGuidance, MotifVideoPipeline, MotifVideoTransformer3DModel

from . import wan
from .base import HEADS, ONES, WIDTH, euler, no_text, prompts, random, sample, slow


def pipe():
    transformer = slow(
        random(
            MotifVideoTransformer3DModel,
            num_layers=1,
            num_single_layers=2,
            patch_size=2,
            text_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
            **HEADS,
        )
    )
    parts = dict(transformer=transformer, vae=wan.vae(), scheduler=euler(), guider=AdaptiveProjectedGuidance(guidance_scale=3.0))
    return MotifVideoPipeline(**parts, **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, **wan.FRAMES)
