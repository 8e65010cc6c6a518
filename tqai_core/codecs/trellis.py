"""Random rotation and a trellis: less error than ``turbo`` at the same bytes, slower to encode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..registry import param
from .scalar import scalar
from .vector import Quantiser, VectorCodec
from .viterbi import trellis4


@dataclass(frozen=True)
class Trellis(VectorCodec, name="trellis", paper="TCQ: Marcellin and Fischer 1990, Ungerboeck 1982; KLT with reverse water-filling"):
    """turbo's container with a four-state trellis-coded quantiser: 24 to 29 % less error at the same bytes, NMSE .087 /
    .0237 / .0064 at 2.06 / 3.06 / 4.06 bits (Gaussian, d = 128). Short calls take turbo's levels by themselves.
    """

    short: int = param(1024, "calls with fewer vectors take scalar levels: the search has a floor of a millisecond", low=0, high=2**31 - 1)

    def kind(self, vectors: int) -> str:
        return "lm" if vectors < self.short else "tcq"

    def quantiser(self, bits: int, d: int | None, device: torch.device, kind: str) -> Quantiser:
        return scalar(bits, d, device) if kind == "lm" else trellis4(bits, device)
