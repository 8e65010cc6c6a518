"""Bits by score: the tokens that matter are held finer than the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import packing
from ..codecs.rows import BITS
from ..errors import TqaiError
from ..registry import param
from ..roles import History, ScoredForecaster, TokenSorter
from ..tokens import tokens, untokens
from ..types import Part, Step


@dataclass(frozen=True)
class Tiered(ScoredForecaster, TokenSorter, name="tiered"):
    """The best scored tokens are held with more bits, the others with fewer; forecast as ``delta2`` does. Without a scorer
    the tokens that changed most are the best. On the minis no score is sharp enough: at equal bytes 7/5 bits have .97 to 1.4
    times the error of uniform 6, so prefer ``delta2``. It pays where few tokens are restless (planted ones: .22 of the error).
    At level kv, where a token's rows are written once, it gains at 2 bits, .74 (by ``palm``) and .75 (by the size of the error) of
    the KL of a plain cache of equal bytes, and loses at 4 (1.06 to 1.26), where values have axes of their own. The codec's bits are the
    coarse tier there.

    Costs one bit a token for the tier beside the codes.
    """

    share: float = param(0.25, "part of the tokens in the fine tier", low=0.0, high=1.0)
    high: int = param(8, "bits a coordinate in the fine tier", low=1, high=8)
    low: int = param(6, "bits a coordinate in the coarse tier", low=1, high=8)
    slope_bits: int = param(3, "bits a coordinate of the slope; 0 = forecast by the last value", low=0, high=8)

    def check(self, level: str) -> None:
        super().check(level)
        if level != "kv":
            return
        if self.low != 6:
            raise TqaiError(
                f"'tiered': low={self.low}; at level 'kv' the coarse tier has the codec's bits: give codec='turbo:bits={self.low}'"
            )
        if self.high not in BITS:
            raise TqaiError(f"'tiered': high={self.high}; rows of a KV cache have {', '.join(map(str, BITS))} bits: give one of these")

    def tiers(self, bits: int) -> tuple[float, int]:
        """Level kv: the codec's bits below, ``high`` above."""
        return self.share, max(self.high, bits)

    @property
    def order(self) -> int:  # type: ignore[override]
        return 1 if self.slope_bits else 0

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        value, slope = self._value(stream), stream.value("slope")
        if value is None or slope is None or stream.step is None:
            return value
        return torch.add(value, slope, alpha=step.sigma - stream.step.sigma)

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        before = self._value(stream)
        parts: dict[str, Part] = {}
        if self.slope_bits and before is not None and stream.step is not None and step.sigma != stream.step.sigma:
            parts["slope"] = Part(((x.float() - before) / (step.sigma - stream.step.sigma)).to(x.dtype), self.slope_bits)
        t = tokens(x)
        b, n, _ = t.shape
        if not isinstance(score, Tensor) or score.ndim < 2:
            score = (t.float() if before is None else t.float() - tokens(before)).square().sum(-1)
        count = round(self.share * n)
        fine = torch.zeros(b, n, dtype=torch.bool, device=x.device)
        fine.scatter_(1, score.expand(b, n).topk(count, dim=1).indices, True)
        stream.state["fine"] = packing.pack(fine.to(torch.uint8), 1)
        order = _order(fine)
        ranked = t.gather(1, order[..., None].expand_as(t))
        if count:
            parts["high"] = Part(ranked[:, :count], self.high)
        if count < n:
            parts["low"] = Part(ranked[:, count:], self.low)
        return parts

    def _value(self, stream: History) -> Tensor | None:
        pieces = [piece for name in ("high", "low") if (piece := stream.value(name)) is not None]
        if not pieces or stream.kind is None:
            return None
        ranked = torch.cat(pieces, dim=1)
        order = _order(packing.unpack(stream.state["fine"], ranked.shape[1], 1).bool())
        return untokens(torch.empty_like(ranked).scatter_(1, order[..., None].expand_as(ranked), ranked), stream.kind[0])


def _order(fine: Tensor) -> Tensor:
    """Token numbers, the fine ones first, each tier in its own order; no host synchronisation."""
    return (~fine).to(torch.uint8).argsort(dim=1, stable=True)
