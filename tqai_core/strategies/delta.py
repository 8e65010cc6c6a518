"""Order 0: the stream stays as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..registry import param
from ..roles import BlockPredictor, Forecaster, History
from ..types import Part, Step


@dataclass(frozen=True)
class Delta(Forecaster, BlockPredictor, name="delta"):
    """Forecast = the last value (plain reuse). On the same schedule it has 24 (Flux), 5 (SD3) and 7 (WAN) times the error of
    ``delta2`` (minis, 24 Euler steps, half of them computed). Holds one tensor a stream.
    At level kv keys are residuals against the mean of their block (values are not: theirs share too little), in the layers where
    that spares more bits than the means take: 1.04 (2 bits) and .90 (4 bits) of the KL of a
    plain cache of equal bytes.
    """

    block: int = param(32, "level kv: tokens that share an anchor", choices=(16, 32, 64, 128), level="kv")

    order = 0

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        return stream.value("value")

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        return {"value": Part(x)}

    @property
    def span(self) -> int:
        return self.block

    def fit(self, k: Tensor) -> Tensor:
        """Level kv: the mean of each block of keys."""
        return k.unflatten(2, (-1, self.block)).mean(3, keepdim=True)
