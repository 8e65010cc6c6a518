"""A list of the steps to compute, as tqai tune finds it for one sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import TqaiError
from ..registry import param
from ..roles import StepMonitor
from ..types import Decision, Step


@dataclass(frozen=True)
class Schedule(StepMonitor, name="schedule"):
    """Computes the evaluations that are listed, the first and (``final``) the last, and forecasts the others, whatever the error. Made by
    ``tqai tune`` for one model and number of steps: a list found on other seeds has .41 (Flux), 1.36 (SD3) and .69 (WAN) of
    the balanced preset's error at half the calls; where it has more, tune keeps the preset. Another number of steps is left exact.
    """

    steps: tuple[int, ...] = param((0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 19, 23), "evaluations to compute, from 0, as in 0+1+2+5")
    total: int = param(24, "evaluations of the run the list is for", low=2, high=1000)
    final: bool = param(True, "compute the last evaluation though it is not listed")

    elsewhere = "it lists a sampler's evaluations; a cache has none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= step < self.total for step in self.steps):
            raise TqaiError(f"monitor 'schedule': steps={self.steps} of {self.total}: give numbers from 0 to {self.total - 1}")

    def idle(self, step: Step) -> str | None:
        if step.total != self.total:
            return f"the schedule is for {self.total} evaluations, this run has {step.total}: tune for it, or take monitor lyapunov"
        return None

    def decide(self, step: Step, importance: float | None, order: int, state: dict[str, Any]) -> Decision:
        seen = state["seen"] = state.get("seen", 0) + 1
        if (step.last and self.final) or seen == 1:
            return Decision(True, "last step" if step.last else "first step")
        due = seen - 1 in self.steps
        return Decision(due, "on the schedule" if due else "not on the schedule")

    def observe(self, step: Step, error: float | None, order: int, state: dict[str, Any]) -> None:
        pass
