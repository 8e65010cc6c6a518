"""Monitors: compute or forecast, one decision a step. One a file."""

from __future__ import annotations

from ..types import Step


def forced(step: Step, seen: int, warmup: int, min_steps: int) -> str | None:
    """Why a step is computed whatever the errors say, or None: every monitor keeps these."""
    if step.total is not None and step.total < min_steps:
        return f"{step.total} steps are too few to forecast (min_steps={min_steps})"
    if step.last:
        return "last step"
    return "warm-up" if seen <= warmup else None
