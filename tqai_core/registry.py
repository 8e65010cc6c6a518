"""Subclassing is registering: one idea is one file with one frozen dataclass and one name.

A file put into ``scorers/``, ``strategies/``, ``monitors/`` or ``codecs/`` is found at import; from its dataclass
fields follow the spec strings, ``tqai methods``, the docs, the node widgets and the matrix test.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from .types import Decision, Packed, Part, Step

if TYPE_CHECKING:
    from .kv_methods import Flush
    from .memory import Stream

ROLES = ("scorer", "strategy", "monitor", "codec")
REGISTRY: dict[str, dict[str, type[Method]]] = {role: {} for role in ROLES}
M = TypeVar("M", bound="Method")


def param(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = (), level: str | None = None,
    kw_only: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that spec strings, the command, the docs and the node widgets all read. ``level`` is the only one where
    it acts, if there is one."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "level": level}, kw_only=kw_only)


class Method:
    """Base of all methods. A subclass is a frozen dataclass whose fields come from :func:`param`."""

    role: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str]
    levels: ClassVar[tuple[str, ...]] = ("model", "block", "attention")
    elsewhere: ClassVar[str] = ""  # why it works at no other level

    def __init_subclass__(cls, *, name: str | None = None, role: str | None = None, paper: str = "", **kw: Any) -> None:
        super().__init_subclass__(**kw)
        if role:
            cls.role = role
        elif name:
            taken = REGISTRY[cls.role].get(name)
            if taken is not None and taken.__module__ != cls.__module__:
                raise ValueError(f"{cls.role} {name!r} is already taken by {taken.__module__}: choose another name")
            cls.name, cls.paper = name, paper
            REGISTRY[cls.role][name] = cls

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, low, high = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("high")
            asked = f"{self.role} {self.name!r}: {f.name}={value!r}"
            if f.metadata.get("choices") and value not in f.metadata["choices"]:
                raise ValueError(f"{asked} is no choice; choose one of {', '.join(map(str, f.metadata['choices']))}")
            if (low is not None or high is not None) and not isinstance(value, (int, float)):
                raise ValueError(f"{asked} must be a number from {low} to {high}")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise ValueError(f"{asked} is out of range; give a value from {low} to {high}")

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


class Scorer(Method, role="scorer"):
    """Says what matters."""

    def score(self, x: Tensor | None, step: Step, stream: Stream) -> Tensor | float | None:
        """Importance in [0, 1] of the tokens ``x [b, n, d]``: ``[b, n]``, or one number.

        At the gate ``x`` is None, since nothing is computed yet: a number for the coming step, or None, and the mean
        score of the last computed step stands. ``stream.state`` is the scorer's own; tensors kept in it are counted.
        No host synchronisation: what is needed stays on the device.
        """
        raise NotImplementedError

    # level kv
    queries: ClassVar[int] = 0  # recent queries it looks at
    centroids: ClassVar[bool] = False  # ranks blocks by what queries want of their centroids

    def weigh(self, flush: Flush) -> Tensor | None:
        """Importance in [0, 1] of the tokens that a cache is about to pack, ``[b, n]``; None where it has no word on them.
        ``flush.state`` is the scorer's own; tensors in it begin with the batch and are counted."""
        return None

    def units(self, layer: int, layers: int, share: float) -> tuple[bool, bool] | None:
        """Whether keys and values of a layer are among the ``share`` of all that matter most and get one size more; None
        where it speaks of tokens."""
        return None


@dataclass(frozen=True)
class Strategy(Method, role="strategy"):
    """Predicts a stream from its history and says what to keep of it. ``order`` is the order of the prediction."""

    cfg: str = param(
        "none", "difference = forecast cond - uncond on half of the computed steps", choices=("none", "difference"), kw_only=True
    )

    name: ClassVar[str] = "none"
    order: ClassVar[int] = 0
    kernel: ClassVar[bool] = False  # acts inside attention, on queries, keys and values

    # level kv
    terms: ClassVar[int] = 0  # lines of a block that keys are predicted by: 1 its mean, 2 its slope too
    sorts: ClassVar[bool] = False  # sorts tokens into tiers without a scorer too
    reads: ClassVar[bool] = False  # reads a part of the blocks

    @property
    def span(self) -> int:
        """Tokens of a block: they are packed together."""
        return 1

    def tiers(self, bits: int) -> tuple[float, int]:
        """Share of the fine tier and its bits, where the codec has ``bits``: the scorer's best eighth gets one size more."""
        return 0.125, {2: 4, 3: 4}.get(bits, 8)

    def lines(self, k: Tensor) -> Tensor:
        """Mean, and slope if ``terms`` is 2, of the blocks of ``k [b, h, n, d]``: ``[b, h, blocks, terms, d]``."""
        raise NotImplementedError

    def kept(self, blocks: int) -> int:
        """How many of so many blocks a step reads."""
        return blocks

    def check(self, level: str) -> None:
        if level == "kv" and self.cfg != "none":
            raise ValueError(f"{self.name!r}: cfg={self.cfg} is about guidance, and a language model has none: leave it out at level 'kv'")

    # levels model, block and attention

    def forecast(self, stream: Stream, step: Step) -> Tensor | None:
        """The stream's value at ``step`` from what is held, fp32, or None when the history is too short."""
        raise NotImplementedError

    def correction(self, x: Tensor, stream: Stream, step: Step, missed: Sequence[tuple[float, float]]) -> Tensor | None:
        """What the forecasts since the last value lack, summed over the ``missed`` steps as (sigma, width) and judged by the
        new value ``x``; None where nothing is to be taken back."""
        return None

    def plan(self, x: Tensor, score: Tensor | float | None, stream: Stream, step: Step) -> dict[str, Part]:
        """The parts to hold from now on, given the exact new value ``x``; they replace the old ones."""
        raise NotImplementedError


class Monitor(Method, role="monitor"):
    """Closes the loop: sees forecasts beside the truth and decides each step once, for all sites and branches."""

    probes: ClassVar[tuple[str, ...]] = ()  # signals that the door must measure for it: entropy

    def idle(self, step: Step) -> str | None:
        """Why nothing of the generation that begins will be forecast, or None: nothing is watched or held then."""
        least = getattr(self, "min_steps", 0)
        if step.total is not None and step.total < least:
            return f"{step.total} steps are too few to forecast (min_steps={least})"
        return None

    def decide(self, step: Step, importance: float | None, order: int, state: dict[str, Any]) -> Decision:
        """Compute or forecast ``step``. ``importance`` is the scorer's word on the step, ``order`` the strategy's."""
        raise NotImplementedError

    def observe(self, step: Step, error: float | None, order: int, state: dict[str, Any]) -> None:
        """``error`` is |forecast - truth| / |truth| over all streams of a computed step, None without a forecast. What the
        door signalled is in ``state`` by its name, as ``state["entropy"]``: a list of floats."""
        raise NotImplementedError

    # level kv
    queries: ClassVar[int] = 0  # recent queries it looks at

    def judge(self, flush: Flush) -> tuple[Decision, float | None]:
        """Whether the tokens that a cache is about to pack are all held in the fine tier (``compute``), and the error that was
        measured, if it was. ``flush.state`` is the monitor's own: plain numbers."""
        raise NotImplementedError


class Codec(Method, role="codec"):
    """Tensor <-> packed bytes. ``encode`` reads vectors along the last dimension."""

    def encode(self, x: Tensor) -> Packed:
        raise NotImplementedError

    def decode(self, packed: Packed, dtype: Any = None) -> Tensor:
        raise NotImplementedError


def discover(package: ModuleType) -> None:
    """Import every module of ``package`` so that its methods register themselves."""
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")


def names(role: str) -> list[str]:
    return sorted(REGISTRY[role])


def parse(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``"palm"``, ``"palm:alpha=0.2,beta=1"`` or ``{"name": "palm", "alpha": 0.2}`` -> name and options."""
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise ValueError(f"{dict(spec)!r} names no method: add 'name', as in {{'name': 'snr'}}")
        return str(options.pop("name")), options
    if not isinstance(spec, str):
        raise ValueError(f"{spec!r} is no method: give 'name', 'name:key=value' or {{'name': ..., key: value}}")
    name, _, tail = spec.partition(":")
    options = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", tail) if tail.strip() else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: {pair!r} has no '='; write {name}:key=value,key=value")
        options[key.strip()] = value.strip()
    return name.strip(), options


def build(role: str, spec: str | Mapping[str, Any] | Method) -> Any:
    """A method from its spec. ValueError lists the known names or options."""
    return _build(role, spec) if isinstance(spec, str) else _build.__wrapped__(role, spec)


@lru_cache(maxsize=1024)
def _build(role: str, spec: Any) -> Any:
    if isinstance(spec, Method):
        if spec.role != role:
            raise ValueError(f"{spec.name!r} is a {spec.role}, asked for a {role}; known: {', '.join(names(role))}")
        return spec
    name, given = parse(spec)
    cls = REGISTRY[role].get(name)
    if cls is None:
        raise ValueError(f"unknown {role} {name!r}; known: {', '.join(names(role))}")
    known = cls.options()
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{role} {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
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
        if wanted is tuple:
            parts = value.split("+") if isinstance(value, str) else value
            return tuple(type(default[0])(part) for part in parts) if default else tuple(parts)
        if wanted is int and not isinstance(value, str) and int(value) != value:
            raise ValueError
        return wanted(value)
    except (TypeError, ValueError):
        raise ValueError(f"{role} {name!r}: {key}={value!r} is no {wanted.__name__}; default is {default!r}") from None


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
