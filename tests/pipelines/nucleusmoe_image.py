"""NucleusMoE-Image: experts that choose their tokens; two calls a step, named by the cache context."""

from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

from . import qwenimage
from .base import HEADS, ONES, SIZE, WIDTH, calm, euler, prompts, random, rnd, sample


def pipe():
    transformer = random(
        NucleusMoEImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), mlp_ratio=2.0, moe_enabled=True, dense_moe_strategy="leave_first_block_dense", num_experts=4,
        moe_intermediate_dim=32, capacity_factors=[2.0, 2.0], **HEADS,
    )  # fmt: skip
    experts = transformer.transformer_blocks[1].img_mlp.experts
    for weight, seed in ((experts.gate_up_proj, 4), (experts.down_proj, 5)):  # made by torch.empty
        weight.data = rnd(*weight.shape, seed=seed) / 6
    calm(transformer.time_text_embed)
    vae = qwenimage.parts()["vae"]
    return NucleusMoEImagePipeline(transformer=transformer, scheduler=euler(), vae=vae, text_encoder=None, processor=None)


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES, negative_prompt_embeds_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, **SIZE)
