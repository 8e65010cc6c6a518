"""Which layers of a model ``skip_layers`` asks for: the same rules for every host."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import TqaiError


def exact_layers(
    asked: Sequence[int | str],
    blocks: Sequence[str],
    model: str,
    *,
    modules: Sequence[str] = (),
    noun: str = "blocks",
    by_number: bool = False,
) -> tuple[set[int], set[str]]:
    """Numbers of the layers that stay exact, and names of the ``modules`` that do.

    Args:
        asked: numbers (-1 is the last) and names, as in ``Config.skip_layers``.
        blocks: names of all layers, in the order in which they run.
        model: what the error calls the model, as in "this sd3 model".
        modules: names of other modules that may be asked for, as of attentions.
        noun: what the error calls a layer.
        by_number: take the first number in a name that is none of ``blocks``: ``"model.layers.3.mlp"`` is layer 3.

    Raises TqaiError for a layer that the model does not have.
    """
    depth = len(blocks)
    numbers, names = set[int](), set[str]()
    for layer in asked:
        number = list(blocks).index(layer) if isinstance(layer, str) and layer in blocks else layer
        if by_number and isinstance(number, str) and (found := re.search(r"\.(\d+)(\.|$)", number)):
            number = int(found[1])
        if isinstance(number, int) and -depth <= number < depth:
            numbers.add(number % depth)
        elif layer in modules:
            names.add(str(layer))
        else:
            examples = " or ".join(repr(group[0]) for group in (blocks, modules) if group)
            cure = f"use 0 to {depth - 1}, -{depth} to -1, or a name such as {examples}"
            raise TqaiError(f"skip layer {layer!r} asked, but {model} has {depth} {noun}: {cure}")
    return numbers, names
