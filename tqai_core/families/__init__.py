"""Model families: all that any host must know of one. A family is one file with one :class:`base.Family` named ``FAMILY``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import TqaiError
from .base import Family

_modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _modules if hasattr(module, "FAMILY")}


def find(model: Any, host: str) -> Family | None:
    """The family of a transformer of ``host`` (``diffusers`` or ``comfyui``): by its class or the nearest class it derives from."""
    known = {path: family for family in FAMILIES.values() for path in getattr(family, host).classes}
    return next((known[path] for cls in type(model).__mro__ if (path := f"{cls.__module__}:{cls.__qualname__}") in known), None)


def family_of(transformer: Any) -> Family:
    """The family of a diffusers transformer; TqaiError for a class that no family has."""
    family = find(transformer, "diffusers")
    if family is None:
        known = ", ".join(path.partition(":")[2] for family in FAMILIES.values() for path in family.diffusers.classes)
        raise TqaiError(f"tqai does not know the transformer class {type(transformer).__name__}; known: {known}")
    return family
