"""Real pipeline classes of diffusers with tiny random weights: a file a family, found by listing. Add one: copy a neighbour.

A file has ``pipe()``, which builds the pipeline (no network, the same weights each time), and ``call(pipe, steps, seed)``, which
runs it and returns its outputs as a list of tensors: latents, and audio where there is audio. It may set ``FAST = True``: then
`make test` runs it, else `make test-all` alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

NAMES = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("base")]


def family(name: str) -> Any:
    """The module of one family."""
    return importlib.import_module(f"{__name__}.{name}")
