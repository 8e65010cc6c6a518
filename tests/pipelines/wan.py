"""WAN 2.1 text to video: two calls a step, named by the cache contexts ``cond`` and ``uncond``; UniPC."""

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .base import HEADS, SIZE, WIDTH, no_text, prompts, random, sample, slow, unipc

FRAMES = dict(num_frames=9, **SIZE)


def vae(**config):
    own = dict(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True])
    return random(AutoencoderKLWan, **(own | config))


def transformer(build=WanTransformer3DModel, **config):
    own = dict(
        patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=WIDTH, freq_dim=32, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32, **HEADS,
    )  # fmt: skip
    return slow(random(build, **(own | config)))


def eye():
    """What sees a picture for the transformers of ``image_dim=4``."""
    config = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=4, intermediate_size=16, patch_size=1
    )
    return dict(image_encoder=random(CLIPVisionModelWithProjection, config=config), image_processor=CLIPImageProcessor(crop_size=4, size=4))


def parts():
    return dict(transformer=transformer(), vae=vae(), scheduler=unipc(), **no_text())


def pipe():
    return WanPipeline(**parts())


def call(pipe, steps, seed, **inputs):
    return sample(pipe, steps, seed, **prompts(), **(dict(guidance_scale=4.0, **FRAMES) | inputs))
