"""Other codecs of vectors, each behind one call. A missing one is named, never skipped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# name -> (encode(x, bits) -> held thing, decode(held) -> tensor)
Peer = tuple[Callable[[Tensor, int], Any], Callable[[Any], Tensor]]


def rounding() -> Peer:
    """Plain rounding to 2^bits levels between the least and the largest of each vector, scale and offset in fp16."""
    from tqai_core.codecs.packing import pack, unpack

    def encode(x: Tensor, bits: int) -> Any:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8).half()
        low = low.half()
        codes = ((x - low) / scale).round().clamp(0, 2**bits - 1)
        return pack(codes.view(-1, x.shape[-1]), bits), scale, low, x.shape, bits

    def decode(held: Any) -> Tensor:
        packed, scale, low, shape, bits = held
        return unpack(packed, shape[-1], bits).view(shape) * scale.float() + low.float()

    return encode, decode


def upstream() -> Peer:
    """tqai 0.6 of the package index: PolarQuantizer (Haar rotation, Lloyd-Max, fp16 norm, one byte a coordinate)."""
    from tqai.quantizer import PolarQuantizer

    made: dict[tuple[int, int], Any] = {}

    def encode(x: Tensor, bits: int) -> Any:
        key = (x.shape[-1], bits)
        if key not in made:
            made[key] = PolarQuantizer(head_dim=key[0], bits=bits)
        return made[key], made[key].quantize(x)

    def decode(held: Any) -> Tensor:
        return held[0].dequantize(*held[1])

    return encode, decode


def quanto() -> Peer:
    """optimum-quanto as transformers' quantised cache calls it: groups of 64, absolute maximum."""
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    def encode(x: Tensor, bits: int) -> Any:
        kind = {2: qint2, 4: qint4}[bits]
        scale, shift = MaxOptimizer()(x, kind, 0, 64)
        return quantize_weight(x, kind, 0, scale, shift, 64)

    return encode, lambda held: held.dequantize()


def hqq() -> Peer:
    """hqq as transformers' quantised cache calls it: groups of 64, axis 1."""
    import torch
    from hqq.core.quantize import Quantizer

    def encode(x: Tensor, bits: int) -> Any:
        return Quantizer.quantize(x.clone(), axis=1, device="cpu", compute_dtype=torch.float32, nbits=bits, group_size=64)

    return encode, lambda held: Quantizer.dequantize(*held)


PEERS = {"plain rounding": rounding, "tqai 0.6 (upstream)": upstream, "quanto": quanto, "hqq": hqq}


def available() -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers that can run here, and why the others cannot."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
