"""What the hosts must know of a family of diffusion transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SELF = ("attn", "attn1")  # names of a block's self-attention in diffusers


@dataclass(frozen=True)
class InHost:
    """A family in one host.

    Attributes:
        classes: the transformer's classes as ``"module:Class"``. Two libraries, or two models of one library, may have classes
            of one name: ComfyUI has an ``MMDiT`` for SD3 and another one for AuraFlow.
        blocks: attributes that hold the transformer's blocks, in the order in which they run.
        entry: weights of the first layer. Their values are the same in all hosts.
    """

    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    entry: str


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: as in ``tqai.preset("balanced", family=name)``.
        diffusers, comfyui: the family in these hosts.
        tolerances: ``tau`` of the monitor ``lyapunov`` for each preset.
        time_scale: ``timestep`` argument of the diffusers class, divided by sigma.
        text_first: text comes before the image in the joint attention of diffusers.
        tokens: diffusers module whose output is the image's tokens.
        rope: diffusers module that makes the rotary tables from the grid alone; "" if the places of the tokens are an argument.
        second_attention: kind of a block's second attention in ComfyUI: ``cross`` for attention to the text.
    """

    name: str
    diffusers: InHost
    comfyui: InHost
    tolerances: Mapping[str, float]
    time_scale: float
    text_first: bool = False
    tokens: str = ""
    rope: str = ""
    second_attention: str = "attn2"

    def layers(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """All blocks of a diffusers transformer with their names, in the order in which they run; ``skip_layers`` counts these."""
        return [(f"{name}.{i}", block) for name in self.diffusers.blocks for i, block in enumerate(getattr(transformer, name))]

    def attentions(self, transformer: Any) -> Iterator[tuple[str, str, nn.Module]]:
        """(site, module name, module) of every attention: ``attn.3`` the third block's self-attention, ``cross.3``, ``attn2.3``."""
        for i, (block_name, block) in enumerate(self.layers(transformer)):
            for name, module in block.named_modules():
                if hasattr(module, "processor") and hasattr(module, "set_processor"):
                    kind = "cross" if getattr(module, "is_cross_attention", False) else "attn" if name in SELF else name
                    yield f"{kind}.{i}", f"{block_name}.{name}", module

    def sigma(self, timestep: Tensor | float) -> float:
        """Sigma of a ``timestep`` argument; the last entry, since WAN TI2V puts zeros before it for given frames."""
        value = timestep.flatten()[-1].item() if isinstance(timestep, Tensor) else timestep
        return float(value) / self.time_scale

    def grid(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """(height, width) or (frames, height, width) of the image tokens of a diffusers call; () where it is unknown."""
        x, patch = kwargs.get("hidden_states"), getattr(transformer.config, "patch_size", None)
        if not isinstance(x, Tensor) or patch is None or x.ndim not in (4, 5):
            return ()
        patches = tuple(patch) if isinstance(patch, (tuple, list)) else (patch,) * (x.ndim - 2)
        return tuple(size // p for size, p in zip(x.shape[2:], patches, strict=True))
