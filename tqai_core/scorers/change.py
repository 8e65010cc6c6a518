"""How much a token moved since it was last computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..registry import param
from ..roles import History, StepScorer
from ..tokens import sketch
from ..types import Step


@dataclass(frozen=True)
class Change(StepScorer, name="change", paper="last relative change, the signal of TeaCache 2411.19108 and FirstBlockCache"):
    """Relative change of a token since its last computed value, r / (r + 1). The best cheap predictor of the next step's
    reuse error on the minis. As a tolerance's weight it seldom beats its absence: .94 to 1.96 times the error at 12 of 24 calls.
    """

    elsewhere = "in caches it lost to plain ones of equal bytes, 1.43 to 3.38 times the KL"

    width: int = param(16, "coordinates of the sketch kept of a token", low=1, high=256)

    def score(self, x: Tensor | None, step: Step, stream: History) -> Tensor | None:
        if x is None:
            return None
        now = sketch(x, self.width)
        before = stream.state.get("sketch")
        stream.state["sketch"] = now.bfloat16()
        if before is None or before.shape != now.shape:
            return now.new_ones(now.shape[:-1])
        moved = (now - before.float()).norm(dim=-1) / now.norm(dim=-1).clamp_min(1e-12)
        return moved / (moved + 1)
