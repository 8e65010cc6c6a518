"""Which layers of a language model are packed how: the same for every library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import TqaiError


def chosen(layers: Sequence[Any], count: int) -> set[int]:
    """Numbers (-1 is the last) and names of modules (``model.layers.3``). ValueError for what is not there."""
    out = set()
    for layer in layers:
        found = re.search(r"\.(\d+)(\.|$)", layer) if isinstance(layer, str) else None
        number = int(found[1]) if found else layer
        if not isinstance(number, int) or not -count <= number < count:
            raise TqaiError(f"skip_layers has {layer!r}: this model has layers 0 to {count - 1}")
        out.add(number % count)
    return out


def strong_layers(full: Sequence[int], protect: int) -> set[int]:
    """The first and last ``protect`` of the packed layers, at most an eighth of them each."""
    edge = min(protect, len(full) // 8)
    return {*full[:edge], *full[len(full) - edge :]} if edge else set()
