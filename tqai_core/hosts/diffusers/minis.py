"""The minis inside diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Sequence
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

PIPELINES = {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline", "wan": "WanPipeline", "z_image": "ZImagePipeline"}
CLASSES = {
    "flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel", "wan": "WanTransformer3DModel", "z_image": "ZImageTransformer2DModel",
}  # fmt: skip
PIXELS, FRAMES = 128, 33  # what pipelines divide by 8 and 4 to get 16 x 16 and 9 frames
EMPTY = 10  # the class of the empty prompt


class PixelVAE(ModelMixin, ConfigMixin):
    """No autoencoder: a mini's latents are its pixels, repeated 8 x 8 (and frames as WAN's decoder counts them)."""

    @register_to_config
    def __init__(self, video: bool = False) -> None:
        super().__init__()
        self.video = video
        self.register_buffer("device_of", torch.zeros(1), persistent=False)
        self.register_to_config(
            block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, shift_factor=0.0, latent_channels=1, z_dim=1,
            latents_mean=[0.0], latents_std=[1.0], scale_factor_temporal=4, scale_factor_spatial=8,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.device_of.dtype

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents ``[b, 1, (f,) 16, 16]`` -> pixels ``[b, 3, (4 f - 3,) 128, 128]``."""
        if self.video:
            z = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
            return (F.interpolate(z, scale_factor=(1, 8, 8)).repeat(1, 3, 1, 1, 1),)
        return (F.interpolate(z, scale_factor=8).repeat(1, 3, 1, 1),)


@lru_cache(maxsize=4)
def _file(kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    if kind not in CLASSES:
        raise TqaiError(f"unknown mini {kind!r}; known: {', '.join(CLASSES)}")
    header, tensors = read_tensors(names.weights(kind), what="mini", again="install tqai-core again")
    return header, {name: x.float() for name, x in tensors.items()}


def transformer(kind: str) -> Any:
    """A fresh copy of the trained transformer, fp32, in eval mode."""
    header, weights = _file(kind)
    model = getattr(diffusers, CLASSES[kind])(**model_config(header))
    model.load_state_dict({k.removeprefix("transformer."): v for k, v in weights.items() if k.startswith("transformer.")})
    return model.eval().requires_grad_(False)


def pipeline(kind: str, scheduler: Any = None) -> Any:
    model = transformer(kind)
    encoders = ("", "_2", "_3")[: {"wan": 1, "z_image": 1, "flux": 2, "sd3": 3}[kind]]
    absent = {f"{part}{nth}": None for part in ("text_encoder", "tokenizer") for nth in encoders}
    pipe = getattr(diffusers, PIPELINES[kind])(
        transformer=model,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=PixelVAE(video=kind == "wan").eval(),
        **absent,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(kind: str, labels: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings ``[n, 4, 64]`` and pooled ones ``[n, 64]`` of class labels; 10 is the empty prompt."""
    index = torch.as_tensor(labels, dtype=torch.long)
    if index.ndim != 1 or not bool(((index >= 0) & (index <= EMPTY)).all()):
        raise TqaiError(f"labels {list(labels)}: give digits from 0 to 9")
    _, weights = _file(kind)
    return weights["tokens"][index], weights["pooled"][index]


def inputs(kind: str, labels: Sequence[int], guidance: float = 2.0) -> dict[str, Any]:
    tokens, pooled = prompts(kind, labels)
    no_tokens, no_pooled = prompts(kind, [EMPTY] * len(labels))
    kw: dict[str, Any] = dict(prompt_embeds=tokens, negative_prompt_embeds=no_tokens, height=PIXELS, width=PIXELS)
    if kind == "wan":
        return kw | dict(num_frames=FRAMES, guidance_scale=guidance)
    if kind == "z_image":  # a list of prompts; its guidance counts from 0: cond + scale (cond - uncond)
        return kw | dict(prompt_embeds=list(tokens), negative_prompt_embeds=list(no_tokens), guidance_scale=guidance - 1)
    kw |= dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=no_pooled)
    return kw | (dict(guidance_scale=guidance) if kind == "sd3" else dict(true_cfg_scale=guidance))


def pixels(kind: str, latents: Tensor) -> Tensor:
    """What a pipeline returns with ``output_type="latent"`` -> pixels ``[n, 1, 16, 16]`` or ``[n, 1, 9, 16, 16]``."""
    return rearrange(latents, "n (h w) (c p q) -> n c (h p) (w q)", h=8, p=2, q=2) if kind == "flux" else latents
