"""Monitors: compute or forecast, one decision a step. One a file."""

from __future__ import annotations

from typing import Any

from ..types import Step

LONG = 1.01  # of the mean step: a longer last step is never forecast, its error weighs more than another's and stays


def distinct_sigmas(step: Step, state: dict[str, Any]) -> int:
    """How many different sigmas the generation has had with this one: some samplers evaluate a sigma more than once (Heun)."""
    sigmas: set[float] = state.setdefault("sigmas", set())
    sigmas.add(round(step.sigma, 6))
    return len(sigmas)


def forced(step: Step, seen: int, warmup: int, final: bool = True) -> str | None:
    """Why a step is computed whatever the errors say, or None: every monitor keeps these. ``final``: so is the last one, however short."""
    if step.last and (final or step.width > LONG):
        return "last step"
    return "warm-up" if seen <= warmup else None
