"""HunyuanVideo Framepack: two sections of a long video, a schedule for each; the second reads the first as its history."""

from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from . import hunyuanvideo
from .base import SIZE, picture, random, sample

CHUNKS = 2
WINDOW = 3  # latent frames of a section


def pipe():
    transformer = hunyuanvideo.transformer(
        HunyuanVideoFramepackTransformer3DModel, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    eye = dict(
        image_encoder=random(SiglipVisionModel, config=config), feature_extractor=SiglipImageProcessor(size=dict(height=32, width=32))
    )
    return HunyuanVideoFramepackPipeline(**(hunyuanvideo.parts() | dict(transformer=transformer)), **eye)


def call(pipe, steps, seed):
    section = dict(num_frames=18, latent_window_size=WINDOW)
    return sample(pipe, steps, seed, image=picture(), **hunyuanvideo.texts(), **section, **SIZE)
