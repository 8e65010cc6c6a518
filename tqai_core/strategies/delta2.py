"""Order 1: the stream continues in a straight line over sigma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import param
from ..roles import BlockPredictor, Forecaster, History, Strategy
from ..types import BEND, Part, Step


class LinearForecast(Strategy):
    """The line through the last two computed values, held as value and slope. A subclass declares ``slope_bits``."""

    slope_bits: int

    order = 1

    def value(self, stream: History) -> Tensor | None:
        """The last computed value as it is held."""
        return stream.value("value")

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        value, slope = self.value(stream), stream.value("slope")
        if value is None or slope is None or stream.step is None:
            return value
        return torch.add(value, slope, alpha=step.sigma - stream.step.sigma)

    def slope(self, x: Tensor, before: Tensor | None, stream: History, step: Step) -> dict[str, Part]:
        """The slope from the held value ``before`` to the new value ``x``, if there is one."""
        if not self.order or before is None or stream.step is None or step.repeats(stream.step.sigma):
            return {}
        return {"slope": Part(((x.float() - before) / (step.sigma - stream.step.sigma)).to(x.dtype), self.slope_bits)}

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        parts = {"value": Part(x), **self.slope(x, self.value(stream), stream, step)}
        if "slope" not in parts and (held := stream.value("slope")) is not None:  # Heun evaluates a sigma twice
            parts["slope"] = Part(held.to(x.dtype), self.slope_bits)
        return parts


@dataclass(frozen=True)
class Delta2(
    LinearForecast, Forecaster, BlockPredictor, name="delta2",
    paper="linear multistep prediction, as in Adams-Bashforth and TaylorSeer 2503.06923",
):  # fmt: skip
    """Forecast = last value + slope x (change of sigma), the line through the last two computed values. Held as value and
    slope: the slope is taken from the exact new value against the decoded old one, so that it stands a few bits: at 8 + 3 bits
    the final error is .93 to 1.10 times that of uncoded copies, at .35 of the bytes of fp16 ones. With ``correct`` an Euler
    sampler ends with less error.
    At level kv keys are residuals against the line through their block, where that pays: .89 (2 bits) and .86 (4 bits) of the KL of a
    plain cache of equal bytes.

    An Euler sampler adds up outputs, so that a wrong forecast can be corrected once the next output is known: the
    parabola through the last three computed values gives the error of the forecasts, and the computed step adds the
    correction. This costs no call and no memory. At a sigma below .1 and in the last step nothing is corrected.
    """

    slope_bits: int = param(3, "bits a coordinate of the slope", low=1, high=8)
    block: int = param(64, "level kv: tokens that share a line", choices=(16, 32, 64, 128), level="kv")
    correct: bool = param(True, "correct the error of forecasts at the next computed step, where the sampler is Euler (level model)")

    terms = 2

    def correction(self, x: Tensor, stream: History, step: Step, skipped: Sequence[tuple[float, float]]) -> Tensor | None:
        value, slope, before = stream.value("value"), stream.value("slope"), stream.state.get("before")
        if not self.correct or value is None or slope is None or stream.step is None or before is None:
            return None
        now, at = step.sigma, stream.step.sigma
        if step.last or now < BEND or now in (at, before):
            return None
        # parabola through (before, at, now) less the line that was forecast, at each skipped sigma
        weight = sum((sigma - at) * (sigma - before) * width for sigma, width in skipped) / (now - before)
        return ((x.float() - value) / (now - at) - slope).mul_(weight)

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        stream.state["before"] = None if stream.step is None else stream.step.sigma
        return super().plan(x, score, stream, step)

    @property
    def span(self) -> int:
        return self.block

    def fit(self, k: Tensor) -> Tensor:
        """Level kv: mean and slope of each block of keys, by least squares over its tokens."""
        blocks = k.unflatten(2, (-1, self.block))
        at = torch.linspace(-1, 1, self.block, device=k.device)[:, None]
        return torch.stack([blocks.mean(3), (blocks * at).sum(3) / at.square().sum()], 3)
