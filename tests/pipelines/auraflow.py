"""AuraFlow: ``timestep`` is sigma; one batch."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

from .base import ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample, vae


def pipe():
    transformer = random(
        AuraFlowTransformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return AuraFlowPipeline(transformer=transformer, scheduler=euler(1.73), vae=vae(), **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_attention_mask=ONES, negative_prompt_attention_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, **SIZE)
