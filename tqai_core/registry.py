"""Subclassing is registering: one idea is one file with one frozen dataclass and one name.

A file put into ``scorers/``, ``strategies/``, ``monitors/`` or ``codecs/`` is found when the first method is asked for; from
its dataclass fields follow the spec strings, ``tqai methods``, the docs, the node widgets and the matrix test.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, ClassVar

from .errors import TqaiError

ROLES = ("scorer", "strategy", "monitor", "codec")
PACKAGES = ("scorers", "strategies", "monitors", "codecs")
REGISTRY: dict[str, dict[str, type[Method]]]  # all methods by role and name; see __getattr__
_known: dict[str, dict[str, type[Method]]] = {role: {} for role in ROLES}
ALIASES: dict[str, dict[str, str]] = {role: {} for role in ROLES}  # other names that configs may use


def param(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = (), level: str | None = None,
    kw_only: bool = False, file: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that spec strings, the command, the docs and the node widgets all read. ``level`` is the only one where
    it acts, if there is one; ``file``: whether another value than the default names a file."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "level": level, "file": file}
    return field(default=default, metadata=metadata, kw_only=kw_only)


class Method:
    """Base of all methods. A subclass is a frozen dataclass whose fields come from :func:`param`."""

    role: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str]
    levels: ClassVar[tuple[str, ...]] = ()  # where it acts: its bases' levels, unless ``levels=`` says otherwise
    elsewhere: ClassVar[str] = ""  # why it works at no other level

    def __init_subclass__(
        cls, *, name: str | None = None, role: str | None = None, levels: tuple[str, ...] = (), paper: str = "",
        aliases: tuple[str, ...] = (), **kw: Any,
    ) -> None:  # fmt: skip
        super().__init_subclass__(**kw)
        if role:
            cls.role = role
        cls.levels = levels or tuple(dict.fromkeys(level for base in cls.__bases__ for level in getattr(base, "levels", ())))
        if name:
            taken = _known[cls.role].get(name)
            if taken is not None and taken.__module__ != cls.__module__:
                raise TqaiError(f"{cls.role} {name!r} is already taken by {taken.__module__}: choose another name")
            cls.name, cls.paper = name, paper
            _known[cls.role][name] = cls
            ALIASES[cls.role].update(dict.fromkeys(aliases, name))

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, low, high = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("high")
            asked = f"{self.role} {self.name!r}: {f.name}={repr(value)[:200]}"
            if isinstance(value, float) and not math.isfinite(value):
                raise TqaiError(f"{asked} is no finite number; default is {f.default!r}")
            if f.metadata.get("choices") and value not in f.metadata["choices"]:
                raise TqaiError(f"{asked} is no choice; choose one of {', '.join(map(str, f.metadata['choices']))}")
            if (low is not None or high is not None) and not isinstance(value, (int, float)):
                raise TqaiError(f"{asked} must be a number from {low} to {high}")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise TqaiError(f"{asked} is out of range; give a value from {low} to {high}")

    def check(self, level: str) -> None:
        """Raises ValueError for options that mean nothing at ``level``."""

    @classmethod
    def options(cls) -> dict[str, dict[str, Any]]:
        """Every option with its default, type, help text and limits."""
        return {
            f.name: {"default": None if f.default is MISSING else f.default, "type": type(f.default), **f.metadata}
            for f in fields(cls)  # type: ignore[arg-type]
        }

    @classmethod
    def summary(cls) -> str:
        """First paragraph of the docstring: what it does, with its measured figure."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())

    def belongs(self, model: Any) -> None:
        """ValueError if a file that this method reads was calibrated on another model than ``model``."""

    @property
    def spec(self) -> str:
        """The shortest spec string that builds this method again."""
        changed = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return self.name + (":" + ",".join(changed) if changed else "")


def discover(package: ModuleType) -> None:
    """Import every module of ``package`` so that its methods register themselves."""
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")


@cache
def _found() -> dict[str, dict[str, type[Method]]]:
    """Every method, once their files are imported: they need torch, which ``tqai --help`` does not wait for."""
    for package in PACKAGES:
        discover(importlib.import_module(f"{__package__}.{package}"))
    return _known


def __getattr__(name: str) -> Any:
    if name == "REGISTRY":
        return _found()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names(role: str) -> list[str]:
    return sorted(_found()[role])


def parse(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``"palm"``, ``"palm:alpha=0.2,beta=1"`` or ``{"name": "palm", "alpha": 0.2}`` -> name and options."""
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise TqaiError(f"{dict(spec)!r} names no method: add 'name', as in {{'name': 'snr'}}")
        return str(options.pop("name")), options
    if not isinstance(spec, str):
        raise TqaiError(f"{spec!r} is no method: give 'name', 'name:key=value' or {{'name': ..., key: value}}")
    name, _, tail = spec.partition(":")
    options = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", tail) if tail.strip() else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TqaiError(f"{spec!r}: {pair!r} has no '='; write {name}:key=value,key=value")
        options[key.strip()] = value.strip()
    return name.strip(), options


def build(role: str, spec: str | Mapping[str, Any] | Method) -> Any:
    """A method from its spec. ValueError lists the known names or options."""
    return _build(role, spec) if isinstance(spec, str) else _build.__wrapped__(role, spec)


@lru_cache(maxsize=1024)
def _build(role: str, spec: Any) -> Any:
    if isinstance(spec, Method):
        if spec.role != role:
            raise TqaiError(f"{spec.name!r} is a {spec.role}, asked for a {role}; known: {', '.join(names(role))}")
        return spec
    name, given = parse(spec)
    methods = _found()[role]
    name = ALIASES[role].get(name, name)
    cls = methods.get(name)
    if cls is None:
        raise TqaiError(f"unknown {role} {name!r}; known: {', '.join(names(role))}")
    known = cls.options()
    if unknown := sorted(given.keys() - known.keys()):
        raise TqaiError(f"{role} {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    return cls(**{key: _cast(role, name, key, value, known[key]["default"]) for key, value in given.items()})


def _cast(role: str, name: str, key: str, value: Any, default: Any) -> Any:
    """``value`` as the type of the option's default; text comes from spec strings."""
    wanted = type(default)
    try:
        if wanted is bool:
            text = str(value).lower()
            if text not in ("true", "false", "1", "0"):
                raise ValueError
            return text in ("true", "1")
        if wanted is str and not isinstance(value, (str, int, float)):
            raise ValueError
        if wanted is tuple:
            parts = value.split("+") if isinstance(value, str) else value
            return tuple(type(default[0])(part) for part in parts) if default else tuple(parts)
        if wanted is int and not isinstance(value, str) and int(value) != value:
            raise ValueError
        return wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise TqaiError(f"{role} {name!r}: {key}={repr(value)[:200]} is no {wanted.__name__}; default is {default!r}") from None


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
