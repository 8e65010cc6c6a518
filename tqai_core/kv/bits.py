"""Bits by layer from one number: ``4.3`` gives three layers of ten five bits, and the others four."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from ..codecs.rows import BITS
from ..errors import TqaiError

EXACT = 16  # bits: the numbers as they are
CENTRE = 0.66  # depth around which a bit of the keys changes the output most: the first layers and the last ones gain nothing


def by_layer(bits: float, layers: int, order: Sequence[int] | None = None) -> tuple[int, ...]:
    """``order``: layers, the most sensitive first, which get the upper width; without it those nearest to two thirds of the depth."""
    if bits == EXACT:
        return (EXACT,) * layers
    low = floor(bits)
    if low not in BITS or (bits > low and low + 1 not in BITS):
        raise TqaiError(f"{bits:g} bits asked; give {', '.join(map(str, BITS))}, or a number between two of them that follow each other")
    order = sorted(range(layers), key=lambda i: abs((i + 0.5) / layers - CENTRE)) if order is None else order
    more = set(order[: round((bits - low) * layers)])
    return tuple(low + (i in more) for i in range(layers))
