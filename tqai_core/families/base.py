"""What the hosts must know of a family of diffusion transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import TqaiError

ALL = ("model", "block", "attention")
ATTENTION = ("model", "attention")  # the host tells the number of a block, and lets nobody around it
MODEL = ("model",)
SELF = ("attn", "attn1")  # names of a block's self-attention in diffusers


@dataclass(frozen=True)
class InHost:
    """A family in one host.

    Attributes:
        classes: the transformer's classes as ``"module:Class"``. Two libraries, or two models of one library, may have classes
            of one name: ComfyUI has an ``MMDiT`` for SD3 and another one for AuraFlow.
        blocks: attributes that hold the transformer's blocks, in the order in which they run.
        levels: where tqai can act in this host.
        entry: weights of the first layer, whose values are the same in all hosts; a calibrated sampler knows its model by them.
    """

    classes: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    entry: str = ""
    levels: tuple[str, ...] = ALL


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: as in ``tqai.preset("balanced", family=name)``.
        title: the models' own names, for tables.
        diffusers, comfyui: the family in these hosts; None where a host does not have it.
        tolerances: ``tau`` of the monitor ``lyapunov`` for each preset, where it was tuned for this family.
        time_scale: ``timestep`` argument of the diffusers class, divided by sigma; None where only the scheduler knows sigma.
        one_batch: guidance runs both branches as one batch [uncond; cond].
        text_first: text comes before the image in the joint attention of diffusers.
        tokens: diffusers module whose output is the image's tokens.
        rope: diffusers module that makes the rotary tables from the grid alone; "" if the places of the tokens are an argument.
        second_attention: kind of a block's second attention in ComfyUI: ``cross`` for attention to the text.
    """

    name: str
    title: str = ""
    diffusers: InHost | None = None
    comfyui: InHost | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    time_scale: float | None = None
    one_batch: bool = False
    text_first: bool = False
    tokens: str = ""
    rope: str = ""
    second_attention: str = "attn2"

    @property
    def by_scheduler(self) -> bool:
        """Whether only the scheduler knows the step: nothing is concluded from the arguments of a call."""
        return self.time_scale is None

    def layers(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """All blocks of a diffusers transformer with their names, in the order in which they run; ``skip_layers`` counts these."""
        places = (self.diffusers.blocks if self.diffusers else ()) or _lists_of_blocks(transformer)
        return [(f"{name}.{i}", block) for name in places for i, block in enumerate(transformer.get_submodule(name))]

    def attentions(self, transformer: Any) -> Iterator[tuple[str, str, nn.Module]]:
        """(site, module name, module) of every attention: ``attn.3`` the third block's self-attention, ``cross.3``, ``attn2.3``."""
        for i, (block_name, block) in enumerate(self.layers(transformer)):
            for name, module in block.named_modules():
                if hasattr(module, "processor") and hasattr(module, "set_processor"):
                    kind = "cross" if getattr(module, "is_cross_attention", False) else "attn" if name in SELF else name
                    yield f"{kind}.{i}", f"{block_name}.{name}", module

    def sigma(self, timestep: Tensor | float) -> float:
        """Sigma of a ``timestep`` argument; the last entry, since WAN TI2V puts zeros before it for given frames."""
        if self.time_scale is None:
            raise TqaiError(f"the time argument of {self.name} tells no sigma: apply tqai to the pipeline, whose scheduler knows it")
        value = timestep.flatten()[-1].item() if isinstance(timestep, Tensor) else timestep
        return float(value) / self.time_scale

    def grid(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """(height, width) or (frames, height, width) of the image tokens of a diffusers call; () where it is unknown."""
        x, patch = kwargs.get("hidden_states"), getattr(getattr(transformer, "config", None), "patch_size", None)
        if not isinstance(x, Tensor) or patch is None or x.ndim not in (4, 5):
            return ()
        patches = tuple(patch) if isinstance(patch, (tuple, list)) else (patch,) * (x.ndim - 2)
        return tuple(size // p for size, p in zip(x.shape[2:], patches, strict=True))


def _lists_of_blocks(transformer: Any) -> list[str]:
    """Names of the module lists that hold the repeated blocks of a class that no family describes: those that diffusers compiles
    one by one, or else all lists of modules with an attention."""
    repeated = set(getattr(transformer, "_repeated_blocks", None) or ())
    lists = [(name, module) for name, module in transformer.named_children() if isinstance(module, nn.ModuleList) and len(module)]
    found = [name for name, blocks in lists if type(blocks[0]).__name__ in repeated]
    return found or [name for name, blocks in lists if any(hasattr(part, "set_processor") for part in blocks[0].modules())]
