"""What the families' files share: seeded weights and inputs, a tiny VAE, one way to run a pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

diffusers.utils.logging.set_verbosity_error()
SIZE = dict(height=64, width=64)  # pixels
WORDS, WIDTH = 6, 32  # tokens of a prompt and their width
HEADS = dict(num_attention_heads=2, attention_head_dim=16)
ONES = torch.ones(1, WORDS, dtype=torch.long)


def rnd(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(*shape: int) -> dict[str, Tensor]:
    """``prompt_embeds`` and ``negative_prompt_embeds``, ``[1, WORDS, WIDTH]`` unless a shape is given."""
    shape = shape or (1, WORDS, WIDTH)
    return {"prompt_embeds": rnd(*shape), "negative_prompt_embeds": rnd(*shape, seed=8)}


def picture(pixels: int = 64, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.RandomState(seed).randint(0, 255, (pixels, pixels, 3), np.uint8))


def film(frames: int = 9, pixels: int = 64) -> list[PIL.Image.Image]:
    return [picture(pixels, i) for i in range(frames)]


def random(build: Callable[..., nn.Module], seed: int = 0, **config: Any) -> Any:
    """``build(**config)`` with seeded weights. Layers that start at zero, as a model's last one often does, get small numbers:
    with zeros the output would not depend on the blocks, and nothing would be tested."""
    torch.manual_seed(seed)
    model = build(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 3)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and p.abs().max() == 0:
            p.normal_(0, 0.05, generator=generator)
    return model


def calm(module: nn.Module, by: float = 0.3) -> None:
    """Weights of a time embedding made smaller: what a trained model computes is smooth in time, what random weights do is not."""
    for p in module.parameters():
        p.mul_(by)


def slow(model: Any) -> Any:
    """``model`` without the fast waves of its embedding of time, to which a trained one gives little weight: they turn more than once
    between two steps, so that with random weights no step would tell of the next."""
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            waves = module.linear_1.weight.unflatten(1, (2, -1))  # sine and cosine, the fastest first
            waves[:, :, : waves.shape[2] // 2] = 0
    return model


def vae(channels: int = 4, build: Callable[..., nn.Module] = AutoencoderKL, **config: Any) -> Any:
    """An autoencoder of ``channels`` channels that shrinks a picture by 8."""
    own = dict(
        sample_size=32, block_out_channels=(4,) * 4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    scaled = dict(shift_factor=0.06, scaling_factor=1.5) if build is AutoencoderKL else {}
    return random(build, **(own | scaled | config))


def euler(shift: float = 3.0, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def unipc(shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def no_text(*numbers: int) -> dict[str, None]:
    """``text_encoder=None, tokenizer=None`` and the same with ``_2``, ``_3`` for these numbers: the prompt comes as embeddings."""
    return {f"{part}{end}": None for end in ("", *(f"_{n}" for n in numbers)) for part in ("text_encoder", "tokenizer")}


def sample(pipe: Any, steps: int, seed: int, **inputs: Any) -> list[Tensor]:
    """Every tensor that the pipeline returns, float32: latents unless ``inputs`` says otherwise."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)  # for noise that a pipeline draws without its generator
    given = {"output_type": "latent", "return_dict": False, "num_inference_steps": steps, **inputs}
    with torch.no_grad():
        out = pipe(**given, generator=torch.Generator().manual_seed(seed))
    return tensors(out)


def tensors(out: Any) -> list[Tensor]:
    """The tensors and arrays in a pipeline's output, copied as float32."""
    found = [torch.as_tensor(x) for x in tree_leaves(out) if isinstance(x, (Tensor, np.ndarray))]
    return [x.detach().float().clone() for x in found]


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The diffusion transformers of a pipeline by the names of their components."""
    home = "diffusers.models.transformers."
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and type(part).__module__.startswith(home)}


class Computed:
    """Counts the evaluations that the transformers really made: calls of their first block, forecast calls not among them."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        self.handles = [block.register_forward_pre_hook(self._hit) for block in self._first_blocks(pipe)]

    @staticmethod
    def _first_blocks(pipe: Any) -> Iterator[nn.Module]:
        for model in denoisers(pipe).values():
            lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
            yield lists[0][0]

    def _hit(self, *_: Any) -> None:
        self.calls += 1

    def take(self) -> int:
        """Evaluations since the last time."""
        calls, self.calls = self.calls, 0
        return calls

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
