"""PRX (Photon): one batch, ``timestep`` is sigma."""

from diffusers import PRXPipeline, PRXTransformer2DModel

from .base import ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        PRXTransformer2DModel, in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    return PRXPipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES.bool(), negative_prompt_attention_mask=ONES.bool())
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, use_resolution_binning=False, **SIZE)
