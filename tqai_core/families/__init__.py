"""Model families: all that any host must know of one. A family is one file with one :class:`base.Family` named ``FAMILY``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import TqaiError
from .any import TIMES, AnyFamily
from .base import Family

_modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _modules if hasattr(module, "FAMILY")}


def find(model: Any, host: str) -> Family | None:
    """The family of a transformer of ``host`` (``diffusers`` or ``comfyui``): by its class or the nearest class it derives from."""
    known = {path: family for family in FAMILIES.values() if (own := getattr(family, host)) for path in own.classes}
    return next((known[path] for cls in type(model).__mro__ if (path := f"{cls.__module__}:{cls.__qualname__}") in known), None)


def family_of(transformer: Any, level: str = "attention") -> Family:
    """The family of a diffusers transformer. At level model any denoiser has one; elsewhere TqaiError for a class that no file knows."""
    family = find(transformer, "diffusers")
    if family is None and level == "model" and AnyFamily.fits(transformer):
        family = AnyFamily.of(transformer)
    if family is None:
        known = ", ".join(path.partition(":")[2] for family in FAMILIES.values() if family.diffusers for path in family.diffusers.classes)
        kind = type(transformer).__name__
        if level == "model":
            raise TqaiError(f"{kind} is no denoiser: its forward takes none of {', '.join(TIMES)}: give the pipeline or its transformer")
        raise TqaiError(f"level {level!r} does not know the transformer class {kind}, known: {known}; level 'model' takes any denoiser")
    return family
