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
from .types import Decision, Step, Where, signature

FIRST = 2  # computed steps that run both branches at the start: the difference then has a slope


class Difference:
    """The forecast difference of two guidance branches, for every site of one model."""

    def __init__(self, memory: Memory, on: bool) -> None:
        self.memory, self.on = memory, on
        self.line: Forecaster = build("strategy", "delta2")
        self.begin()

    def begin(self) -> None:
        self.computed = 0
        self.turn = False  # whether the difference is forecast at this step

    def enter(self, step: Step, decision: Decision) -> None:
        """Every second computed step is the difference's turn."""
        self.computed += decision.compute
        self.turn = self.on and decision.compute and self.computed > FIRST and (self.computed - FIRST) % 2 == 1 and not step.last

    def ready(self, where: Where) -> bool:
        """Whether it is the difference's turn and it has a slope."""
        held = self.memory.streams.get(_key(where))
        return self.turn and held is not None and "slope" in held.parts

    def due(self, where: Where, sibling: Where, step: Step) -> bool:
        """Whether ``where`` may be predicted from ``sibling``, which was computed at this same step."""
        computed = self.memory.streams.get(sibling)
        return self.ready(where) and computed is not None and computed.step is step and computed.kind == self.memory[_key(where)].kind

    def other(self, where: Where, sibling: Where, strategy: Forecaster, step: Step) -> Tensor:
        """The branch ``where`` is ``sibling``, as it is held at this step, minus the forecast difference."""
        held, computed = self.memory[_key(where)], self.memory[sibling]
        x = strategy.forecast(computed, step) - self.line.forecast(held, step)  # type: ignore[operator]
        held.decoded.clear()
        computed.decoded.clear()
        return x.to(computed.kind[1])  # type: ignore[index]

    def observe(self, where: Where, sibling: Where, x: Tensor, strategy: Forecaster, step: Step) -> None:
        """Both branches were computed: hold their difference."""
        computed = self.memory.streams.get(sibling)
        if not self.on or computed is None or computed.step is not step or computed.kind != signature(x) or not x.numel():
            return
        held = self.memory[_key(where)]
        difference = (strategy.forecast(computed, step) - x.float()).to(x.dtype)  # type: ignore[operator]
        computed.decoded.clear()
        held.hold(self.line.plan(difference, None, held, step), difference, step)
        self.memory.count(_key(where), 2)


def _key(where: Where) -> Where:
    return replace(where, kind=f"{where.kind} difference")
