"""Which layers of a language model are packed, and how: the same for every library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..config import Config
from ..errors import TqaiError
from ..registry import build
from .segments import Plan


def layer_plans(config: Config, own_forms: Sequence[str]) -> list[Plan | str]:
    """The plan of each layer, or the reason why it stays exact.

    ``own_forms`` has a text for each layer: the class of its cache where that cannot be packed (a sliding window, a state
    space), "" where it can.
    """
    codec: Any = build("codec", config.codec)
    skip = chosen(config.skip_layers, len(own_forms))
    strong = strong_layers([i for i, form in enumerate(own_forms) if not form], config.protect)

    def plan(i: int) -> Plan | str:
        if codec.name == "exact":
            return "codec exact"
        if i in skip:
            return "skip_layers"
        if own_forms[i]:
            return f"{own_forms[i]} keeps its own form"
        bits_k, bits_v = (max(bits or codec.bits, 8 if i in strong else 0) for bits in (codec.bits_k, codec.bits_v))
        return Plan(bits_k, bits_v, config.sink, config.recent, config.calibrate, codec.seed)

    return [plan(i) for i in range(len(own_forms))]


def chosen(layers: Sequence[Any], count: int) -> set[int]:
    """Layers by number (-1 is the last) or by the name of a module (``model.layers.3``). TqaiError for what is not there."""
    out = set()
    for layer in layers:
        found = re.search(r"\.(\d+)(\.|$)", layer) if isinstance(layer, str) else None
        number = int(found[1]) if found else layer
        if not isinstance(number, int) or not -count <= number < count:
            raise TqaiError(f"skip_layers has {layer!r}: this model has layers 0 to {count - 1}")
        out.add(number % count)
    return out


def strong_layers(full: Sequence[int], protect: int) -> set[int]:
    """The first and last ``protect`` of the layers ``full`` that can be packed, at most an eighth of them at either end."""
    edge = min(protect, len(full) // 8)
    return {*full[:edge], *full[len(full) - edge :]} if edge else set()
