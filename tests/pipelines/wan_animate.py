"""WAN Animate: two segments of a long video, a schedule for each; the second begins with the last frame of the first."""

from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

from . import wan
from .base import euler, film, picture, prompts, sample

CHUNKS = 2
SEGMENT = 5  # frames


def pipe():
    transformer = wan.transformer(
        WanAnimateTransformer3DModel, in_channels=36, latent_channels=16, image_dim=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    parts = wan.parts() | dict(transformer=transformer, scheduler=euler(), **wan.eye())
    return WanAnimatePipeline(**parts)


def call(pipe, steps, seed):
    videos = dict(image=picture(), pose_video=film(2 * SEGMENT - 1), face_video=film(2 * SEGMENT - 1, 16))
    sizes = dict(height=64, width=64, segment_frame_length=SEGMENT, prev_segment_conditioning_frames=1)
    return sample(pipe, steps, seed, **prompts(), **videos, **sizes, guidance_scale=4.0)
