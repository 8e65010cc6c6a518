"""Random rotation and Lloyd-Max levels: the fast codec, and the one for short calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..registry import param
from ..roles import CacheCodec
from .scalar import scalar
from .vector import Quantiser, VectorCodec


@dataclass(frozen=True)
class Turbo(
    VectorCodec, CacheCodec, name="turbo", paper="TurboQuant 2504.19874; randomised Hadamard + Lloyd-Max = scalar HIGGS 2411.17525"
):
    """Random rotation (Hadamard, or QR where d is no power of two), Lloyd-Max levels, one log gain a vector. Encodes at
    1,325 MB/s of fp32 at 4 bits on one core of an AMD EPYC; NMSE .115 / .0335 / .0091 at 2.06 / 3.06 / 4.06 bits (Gaussian, d = 128).
    """

    bits_k: int = param(0, "bits of keys at level kv: 2 to 6 or 8; 0 = as bits", choices=(0, 2, 3, 4, 5, 6, 8), level="kv")
    bits_v: int = param(0, "bits of values at level kv; 0 = as bits", choices=(0, 2, 3, 4, 5, 6, 8), level="kv")

    def kind(self, vectors: int) -> str:
        return "lm"

    def quantiser(self, bits: int, d: int | None, device: torch.device, kind: str) -> Quantiser:
        return scalar(bits, d, device)
