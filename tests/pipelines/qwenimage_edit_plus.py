"""Qwen-Image-Edit (2509 and 2511): the tokens of a picture follow those of the latent, and the pipeline cuts them off the output."""

from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

from . import qwenimage
from .base import ONES, SIZE, picture, prompts, sample

pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 64 * 64  # pixels to which every picture is scaled, else 1024 * 1024


def pipe():
    return QwenImageEditPlusPipeline(**qwenimage.parts(), processor=None)


def call(pipe, steps, seed):
    masks = dict(prompt_embeds_mask=ONES, negative_prompt_embeds_mask=ONES)
    return sample(pipe, steps, seed, **prompts(), **masks, image=picture(), true_cfg_scale=3.0, **SIZE)
