"""Cosmos-Predict 2.5: two calls a step without a context; ``timestep`` is sigma, and a value a frame where frames are given."""

import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from torch import nn

from . import wan
from .base import HEADS, WIDTH, film, no_text, prompts, random, sample, unipc


class NoGuard(nn.Module):
    """Stands where the pipeline wants its safety checker, which is another package's."""

    device, dtype = torch.device("cpu"), torch.float32


def transformer(**config):
    return random(
        CosmosTransformer3DModel, in_channels=17, out_channels=16, num_layers=2, mlp_ratio=2, text_embed_dim=WIDTH, adaln_lora_dim=4,
        max_size=(4, 32, 32), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, **(HEADS | config),
    )  # fmt: skip


def parts():
    return dict(transformer=transformer(), vae=wan.vae(), scheduler=unipc(), safety_checker=NoGuard(), **no_text())


def pipe():
    return Cosmos2_5_PredictBasePipeline(**parts())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=3.0, video=film(5), **wan.FRAMES)
