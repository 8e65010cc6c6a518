"""Any denoiser that no other file knows: level model alone, where the output is taken as a whole and nothing inside is touched."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from .base import Family

TIMES = ("timestep", "timesteps", "t", "vision_timesteps")  # names of the time argument in diffusers


@dataclass(frozen=True)
class AnyFamily(Family):
    """A class by its name. Its tolerance is the one that suits all tuned families, its sigma comes from the scheduler."""

    @staticmethod
    def of(model: Any) -> AnyFamily:
        return AnyFamily(type(model).__name__)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether ``model`` looks like a denoiser: its forward takes a time."""
        forward = getattr(model, "forward", None)
        return forward is not None and not set(TIMES).isdisjoint(inspect.signature(forward).parameters)
