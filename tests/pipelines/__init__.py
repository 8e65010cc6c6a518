"""Real pipeline classes of diffusers with tiny random weights: a file a family, found by listing. Add one: copy a neighbour.

A file has ``pipe()``, which builds the pipeline (no network, the same weights each time), and ``call(pipe, steps, seed)``, which
runs it and returns its outputs as a list of tensors: latents, and audio where there is audio. It may set ``FAST = True``: then
`make test` runs it, else `make test-all` alone. ``EXACT = "word"`` says that the sampler is no flow: tqai computes it exactly, for a
reason in its report that has this word. ``CHUNKS = 2`` says that a video is made of two parts, a schedule for each: each is a
generation of its own for tqai, and the report is that of the last.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

NAMES = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("base")]
FAST = [name for name in NAMES if "\nFAST = True\n" in (Path(__path__[0]) / f"{name}.py").read_text()]  # an import takes seconds


def family(name: str) -> Any:
    """The module of one family, and :mod:`base` with it."""
    return importlib.import_module(f"{__name__}.{name}")
