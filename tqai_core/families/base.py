"""Base of the model families: what the diffusers adapter must know of a transformer class. One family a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SELF = ("attn", "attn1")  # names of a block's self-attention


@dataclass(frozen=True)
class Family:
    """``classes`` are transformer class names, ``blocks`` the attributes that hold its layers in order, ``time_scale``
    the factor between sigma and the ``timestep`` that the class takes, ``text_first`` the place of text in joint attention.
    ``tokens`` is the module whose output are the image's tokens, ``rope`` the one that makes their rotary tables, where it
    is not told their places."""

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    time_scale: float
    text_first: bool = False
    tokens: str = ""
    rope: str = ""

    def layers(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """All blocks with their names, in the order they run; ``skip_layers`` counts these."""
        return [(f"{name}.{i}", block) for name in self.blocks for i, block in enumerate(getattr(transformer, name))]

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
        """(height, width) or (frames, height, width) of the image tokens of a call; () where it is unknown."""
        x, patch = kwargs.get("hidden_states"), getattr(transformer.config, "patch_size", None)
        if not isinstance(x, Tensor) or patch is None or x.ndim not in (4, 5):
            return ()
        patches = tuple(patch) if isinstance(patch, (tuple, list)) else (patch,) * (x.ndim - 2)
        return tuple(size // p for size, p in zip(x.shape[2:], patches, strict=True))
