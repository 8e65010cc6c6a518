"""Half of the last value."""

from dataclasses import dataclass

from torch import Tensor

from ..registry import param
from ..roles import Forecaster, History
from ..types import Part, Step


@dataclass(frozen=True)
class ToyHalf(Forecaster, name="toyhalf"):
    """A bad forecast that a test can tell from all others."""

    part: float = param(0.5, "of the last value", low=0.0, high=1.0)

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        value = stream.value("value")
        return None if value is None else value * self.part

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        return {"value": Part(x)}
