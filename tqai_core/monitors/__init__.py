"""Monitors: compute or forecast, one decision a step. One a file."""

from __future__ import annotations

from ..types import Step


def forced(step: Step, seen: int, warmup: int) -> str | None:
    """Why a step is computed whatever the errors say, or None: every monitor keeps these."""
    if step.last:
        return "last step"
    return "warm-up" if seen <= warmup else None
