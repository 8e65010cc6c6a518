"""HiDream: experts routed by token, one batch, the output negated by the pipeline."""

from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

from .base import HEADS, SIZE, WIDTH, WORDS, euler, no_text, random, rnd, sample, vae


def pipe():
    transformer = random(
        HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        caption_channels=[WIDTH, WIDTH], text_emb_dim=64, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32), llama_layers=(0, 1), force_inference_output=True, **HEADS,
    )  # fmt: skip
    made = HiDreamImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text(2, 3, 4))
    made.default_sample_size = 8  # every size is scaled to this one's area
    return made


def call(pipe, steps, seed):
    text = {}
    for name, first in (("", 7), ("negative_", 8)):
        text[f"{name}prompt_embeds_t5"] = rnd(1, WORDS, WIDTH, seed=first)
        text[f"{name}prompt_embeds_llama3"] = rnd(2, 1, WORDS, WIDTH, seed=first + 9)
        text[f"{name}pooled_prompt_embeds"] = rnd(1, 64, seed=first + 18)
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, **SIZE)
