"""Gauss-Newton sensitivity of a model's output to errors in keys and values, by Hutchinson probes.

For a random cotangent r with E[r r'] = G, the metric of the output, g = J'r is the gradient of r.out at the keys or values
of a unit, and E[(g.e)^2] = e'J'GJe: what an error e of the unit costs the output, up to second order (Martens 1412.1193;
Hutchinson 1989). Here e is what a quantiser really does to the unit, one width after the other, so that errors that add up
over tokens are counted as such: the diagonal alone, sum of g^2 e^2, underrates values against keys and ranks units
worse. One backward pass serves all units and widths; what arrives is contracted
at once, so that memory stays that of one block (see :func:`hosts.attention_interceptor.checkpointed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..hosts.attention_interceptor import checkpointed, intercept_attention
from ..hosts.calibration_targets import CalibrationTarget
from .file import WIDTHS


class Sums:
    """Running sums by unit, band and width; what a resumed run goes on from."""

    def __init__(self, layers: int, heads: int, bands: int) -> None:
        self.error = torch.zeros(layers, heads, 2, bands, len(WIDTHS), dtype=torch.float64)
        self.damage = torch.zeros_like(self.error)
        self.samples = torch.zeros(bands, dtype=torch.float64)  # probes that were summed

    def tables(self) -> dict[str, Tensor]:
        """Means of a sample. ``fisher``: what a unit of squared error costs, the geometric mean over the widths."""
        error, damage = (x / self.samples.clamp_min(1)[:, None] for x in (self.error, self.damage))
        rate = damage.clamp_min(1e-30).log() - error.clamp_min(1e-30).log()
        return {"fisher": rate.mean(-1).exp().float(), "error": error.float(), "damage": damage.float()}


def probe(
    target: CalibrationTarget, band: int, call: Callable[[], Tensor], sums: Sums, codecs: Mapping[int, Any], g: torch.Generator
) -> None:
    """One forward and backward pass of ``call``, added to ``sums``."""
    values: dict[tuple[int, int], Tensor] = {}
    back = False

    def change(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = (k + zero.to(k), v + zero.to(v))
        for which, x in enumerate((k, v)):
            if back:  # the block runs again on the way back: its keys and values are held until their gradients are there
                values[layer, which] = x.detach()
            else:
                out[which].register_hook(partial(contract, layer, which))
        return out

    def contract(layer: int, which: int, grad: Tensor) -> None:
        x, grad = values.pop((layer, which)), grad.detach().float()
        for i, bits in enumerate(WIDTHS):
            gap = codecs[bits].decode(codecs[bits].encode(x), torch.float32) - x.float()
            sums.damage[layer, :, which, band, i] += (gap * grad).sum((2, 3)).square().sum(0).cpu()
            sums.error[layer, :, which, band, i] += gap.square_().sum((0, 2, 3)).cpu()

    with torch.enable_grad(), checkpointed(target.model), intercept_attention(target.model, change):
        zero = torch.zeros((), requires_grad=True)
        out = call()
        back = True
        (out * target.probe(out, g)).sum().backward()
    sums.samples[band] += len(out)
