"""JoyImage: a picture as a film of one frame, all reference frames and the noise in one latent; one batch."""

from diffusers import AutoencoderKLWan, JoyImageEditPipeline, JoyImageEditTransformer3DModel
from diffusers.pipelines.joyimage import image_processor

from .base import ONES, SIZE, WIDTH, euler, no_text, prompts, random, sample

image_processor.BUCKETS[1024] = [(64, 64)]  # the sizes to which every picture is changed


def pipe():
    transformer = random(
        JoyImageEditTransformer3DModel, patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=WIDTH,
        mlp_width_ratio=2.0, num_layers=2, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    vae = random(AutoencoderKLWan, base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True])
    return JoyImageEditPipeline(transformer=transformer, scheduler=euler(), vae=vae, processor=None, **no_text())


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES, negative_prompt_embeds_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, guidance_scale=3.0, **SIZE)
