"""Guidance at half the price: cond - uncond moves slowly, so on half of the computed steps it is forecast.

The difference is carried on in a straight line over sigma; copying the branch itself errs far more and is not
offered. Uniform in the schedule, with the first steps and the last computed: schedules that skip later steps more often are worse.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .memory import Memory
from .registry import build
from .roles import Forecaster
from .types import Decision, Step, Where

FIRST = 2  # computed steps that run both branches before one is spared: the difference then has a slope


class Difference:
    """The forecast difference of two guidance branches, for every site of one model."""

    def __init__(self, memory: Memory, on: bool) -> None:
        self.memory, self.on = memory, on
        self.line: Forecaster = build("strategy", "delta2")
        self.begin()

    def begin(self) -> None:
        self.computed = 0
        self.turn = False

    def enter(self, step: Step, decision: Decision) -> None:
        """Every second computed step is the difference's turn."""
        self.computed += decision.compute
        self.turn = self.on and decision.compute and self.computed > FIRST and (self.computed - FIRST) % 2 == 1 and not step.last

    def ready(self, where: Where) -> bool:
        """Whether this step's turn it is and the difference has a slope."""
        held = self.memory.streams.get(_key(where))
        return self.turn and held is not None and "slope" in held.parts

    def due(self, where: Where, sibling: Where, step: Step) -> bool:
        """Whether ``where`` may be taken from ``sibling``, which was computed at this very step."""
        other = self.memory.streams.get(sibling)
        return self.ready(where) and other is not None and other.step is step and other.kind == self.memory[_key(where)].kind

    def other(self, where: Where, sibling: Where, strategy: Forecaster, step: Step) -> Tensor:
        """The branch ``where`` from ``sibling``, as it is held at this step, and the forecast difference."""
        gap, near = self.memory[_key(where)], self.memory[sibling]
        x = strategy.forecast(near, step)
        y = x - self.line.forecast(gap, step)  # type: ignore[operator]
        gap.decoded.clear()
        near.decoded.clear()
        return y.to(near.kind[1])  # type: ignore[index]

    def observe(self, where: Where, sibling: Where, x: Tensor, strategy: Forecaster, step: Step) -> None:
        """Both branches were computed: learn their difference."""
        near = self.memory.streams.get(sibling)
        if not self.on or near is None or near.step is not step or near.kind != (x.shape, x.dtype, x.device) or not x.numel():
            return
        key = _key(where)
        gap = self.memory[key]
        difference = (strategy.forecast(near, step) - x.float()).to(x.dtype)  # type: ignore[operator]
        near.decoded.clear()
        gap.hold(self.line.plan(difference, None, gap, step), difference, step)
        self.memory.count(key, 2)


def _key(where: Where) -> Where:
    return replace(where, kind=f"{where.kind} difference")
