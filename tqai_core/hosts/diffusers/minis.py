"""The minis inside diffusers' own pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from ...errors import TqaiError
from ...files import model_config, read_tensors
from ...minis import names

SCALE = 2.0  # of photographs' pixels, so that their standard deviation is near 1
FRAMES = 33  # what the pipeline divides by 4 to get 9 frames


@dataclass(frozen=True)
class Class:
    """What a mini is of. ``side``: of its latents, in pixels of the mini. ``guidance``: what its pictures are best with."""

    pipeline: str
    transformer: str
    channels: int = 1
    side: int = 16
    guidance: float = 2.0


CLASSES = {
    "flux": Class("FluxPipeline", "FluxTransformer2DModel"),
    "sd3": Class("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "wan": Class("WanPipeline", "WanTransformer3DModel"),
    "z_image": Class("ZImagePipeline", "ZImageTransformer2DModel"),
    names.PHOTO: Class("FluxPipeline", "FluxTransformer2DModel", channels=3, side=32, guidance=1.5),
    names.SIZES: Class("WanPipeline", "WanTransformer3DModel"),
}


def of(kind: str) -> Class:
    """A mini's class; of a student its teacher's."""
    base = names.STUDENTS.get(kind, kind)
    if base not in CLASSES:
        raise TqaiError(f"unknown mini {kind!r}; known: {', '.join((*CLASSES, *names.STUDENTS))}")
    return CLASSES[base]


class PixelVAE(ModelMixin, ConfigMixin):
    """No autoencoder: a mini's latents are its pixels times a scale, repeated 8 x 8 (and frames as WAN's decoder counts them)."""

    @register_to_config
    def __init__(self, video: bool = False, channels: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.video, self.channels, self.scale = video, channels, scale
        self.register_buffer("device_of", torch.zeros(1), persistent=False)
        self.register_to_config(
            block_out_channels=(1, 1, 1, 1), scaling_factor=scale, shift_factor=0.0, latent_channels=channels, z_dim=channels,
            latents_mean=[0.0], latents_std=[1.0], scale_factor_temporal=4, scale_factor_spatial=8,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.device_of.dtype

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents ``[b, c, (f,) h, w]`` -> pixels ``[b, 3, (4 f - 3,) 8 h, 8 w]``."""
        if self.video:
            z = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
            return (F.interpolate(z, scale_factor=(1, 8, 8)).repeat(1, 3, 1, 1, 1),)
        return (F.interpolate(z, scale_factor=8).repeat(1, 3 // self.channels, 1, 1),)


@lru_cache(maxsize=8)
def _file(kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and weights; of a student its teacher's with the difference added."""
    of(kind)
    header, tensors = read_tensors(names.weights(kind), what="mini", again="install tqai-core again")
    weights = {name: x.float() for name, x in tensors.items()}
    if kind not in names.STUDENTS:
        return header, weights
    header, base = _file(names.STUDENTS[kind])
    learnt = {f"transformer.{name.removesuffix('.up')}.weight": name.removesuffix("up") for name in weights if name.endswith(".up")}
    return header, base | {name: base[name] + weights[f"{part}up"] @ weights[f"{part}down"] for name, part in learnt.items()}


def transformer(kind: str) -> Any:
    """A fresh copy of the trained transformer, fp32, in eval mode."""
    header, weights = _file(kind)
    model = getattr(diffusers, of(kind).transformer)(**model_config(header))
    model.load_state_dict({k.removeprefix("transformer."): v for k, v in weights.items() if k.startswith("transformer.")})
    return model.eval().requires_grad_(False)


def pipeline(kind: str, scheduler: Any = None) -> Any:
    model, cls = transformer(kind), of(kind)
    encoders = ("", "_2", "_3")[: {"FluxPipeline": 2, "StableDiffusion3Pipeline": 3}.get(cls.pipeline, 1)]
    absent = {f"{part}{nth}": None for part in ("text_encoder", "tokenizer") for nth in encoders}
    video = cls.pipeline == "WanPipeline"
    pipe = getattr(diffusers, cls.pipeline)(
        transformer=model,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=PixelVAE(video, cls.channels, scale=SCALE if cls.channels == 3 else 1.0).eval(),
        **absent,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(kind: str, labels: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings ``[n, 4, 64]`` and pooled ones ``[n, 64]`` of class labels; the last one is the empty prompt."""
    index = torch.as_tensor(labels, dtype=torch.long)
    _, weights = _file(kind)
    last = len(weights["tokens"]) - 1
    if index.ndim != 1 or not bool(((index >= 0) & (index <= last)).all()):
        raise TqaiError(f"labels {list(labels)}: give numbers from 0 to {last - 1}")
    return weights["tokens"][index], weights["pooled"][index]


def inputs(kind: str, labels: Sequence[int], guidance: float | None = None, side: int | None = None) -> dict[str, Any]:
    """``side``: of the latents in pixels, 16 or 32 of photographs."""
    cls = of(kind)
    guidance = (1.0 if kind in names.STUDENTS else cls.guidance) if guidance is None else guidance
    tokens, pooled = prompts(kind, labels)
    no_tokens, no_pooled = prompts(kind, [len(_file(kind)[1]["tokens"]) - 1] * len(labels))
    pixels = 8 * (side or cls.side)  # pipelines divide by 8
    kw: dict[str, Any] = dict(prompt_embeds=tokens, negative_prompt_embeds=no_tokens, height=pixels, width=pixels)
    if cls.pipeline == "WanPipeline":
        return kw | dict(num_frames=FRAMES, guidance_scale=guidance)
    if kind == "z_image":  # a list of prompts; its guidance counts from 0: cond + scale (cond - uncond)
        return kw | dict(prompt_embeds=list(tokens), negative_prompt_embeds=list(no_tokens), guidance_scale=guidance - 1)
    kw |= dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=no_pooled)
    return kw | (dict(guidance_scale=guidance) if kind == "sd3" else dict(true_cfg_scale=guidance))


def pixels(kind: str, latents: Tensor) -> Tensor:
    """What a pipeline returns with ``output_type="latent"`` -> pixels in [-1, 1], ``[n, c, h, w]`` or ``[n, 1, 9, 16, 16]``."""
    cls = of(kind)
    if cls.pipeline == "FluxPipeline":
        latents = rearrange(latents, "n (h w) (c p q) -> n c (h p) (w q)", h=math.isqrt(latents.shape[1]), p=2, q=2)
    return latents / SCALE if cls.channels == 3 else latents
