"""Base of the model families: what the diffusers adapter must know of a transformer class. One family a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Family:
    """``classes`` are transformer class names, ``blocks`` the attributes that hold its layers in order, ``time_scale``
    the factor between sigma and the ``timestep`` that the class takes."""

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    time_scale: float

    def layers(self, transformer: Any) -> list[Any]:
        """All blocks in the order they run; ``skip_layers`` counts these."""
        return [block for name in self.blocks for block in getattr(transformer, name)]

    def sigma(self, timestep: Tensor | float) -> float:
        """Sigma of a ``timestep`` argument; the last entry, since WAN TI2V puts zeros before it for given frames."""
        value = timestep.flatten()[-1].item() if isinstance(timestep, Tensor) else timestep
        return float(value) / self.time_scale
