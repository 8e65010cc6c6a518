"""What a script, a graph and a file share: frozen, hashable, versioned, a JSON round trip."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import TqaiError
from .families import FAMILIES, entry
from .files import checked, parse_json
from .registry import ROLES, Method, build, parse
from .roles import Codec, Monitor, Scorer, Strategy

VERSION = 1
LEVELS = ("model", "block", "attention", "kv")
STAGES = {"strategy": "delta2", "monitor": "lyapunov", "codec": "turbo:bits=8"}  # what is left out; at level kv: a plain packed cache
STAGES_KV = {"strategy": None, "monitor": None, "codec": "turbo:bits_k=5,bits_v=4"}
CACHE = {"sink": 4, "recent": 28, "protect": 0, "calibrate": 256}
CACHE_BEFORE = {"recent": 64, "protect": 2}  # what these were when a config of another level was written
MOST_LAYERS = 10_000  # numbers of blocks lie below this, and so many may be named
AGAIN = "write the file with config.to_json()"
Spec = str | Mapping[str, Any] | Method | None


@dataclass(frozen=True)
class Config:
    """A pipeline. Each stage is ``"name"``, ``"name:key=value,..."``, ``{"name": ..., key: value}`` or None (absent).

    ``level`` is where it acts: ``model`` (the whole output), ``block`` (what each block adds), ``attention``
    (each attention's output), ``kv`` (the KV cache of a language model). ``skip_layers`` are blocks that must stay exact:
    numbers (-1 is the last), ranges ``"0-2"``, names of modules (``"blocks.3.attn2"``). At level ``kv``: ``sink`` first and
    ``recent`` last tokens stay exact, up to ``protect`` first and last layers (at most an eighth of them each) are held
    at 8 bits, ``calibrate`` tokens are waited for before keys are scaled (0: never); without a scorer, strategy and monitor
    it is a plain packed cache. ``offload``: the packed caches of a diffusion transformer lie in host memory. ``half_size``
    (level model): the first steps run at half the height and width, until a larger share than this of the finer detail is signal
    and no longer noise (0: never; see :mod:`half_size`). Stages are stored in their shortest spec form, so that equal pipelines are
    equal and hash alike.
    """

    scorer: Any = None
    strategy: Any = "default"
    monitor: Any = "default"
    codec: Any = "default"
    level: str = "model"
    skip_layers: tuple[int | str, ...] = ()
    sink: int = CACHE["sink"]
    recent: int = CACHE["recent"]
    protect: int = CACHE["protect"]
    calibrate: int = CACHE["calibrate"]
    offload: bool = False
    half_size: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        for role, spec in (STAGES_KV if self.level == "kv" else STAGES).items():
            if getattr(self, role) == "default":
                object.__setattr__(self, role, spec)
        if not isinstance(self.version, int) or self.version > VERSION or self.version < 1:
            raise TqaiError(f"config version {str(self.version)[:80]!r}: this tqai reads 1 to {VERSION}; upgrade tqai-core")
        if self.level not in LEVELS:
            raise TqaiError(f"level={self.level!r} is unknown; known: {', '.join(LEVELS)}")
        for role in ROLES:
            spec = getattr(self, role)
            absent = spec is None or (isinstance(spec, str) and spec.strip().lower() in ("", "none"))
            method = None if absent else build(role, spec)
            if method is not None and self.level not in method.levels:
                why = f" ({method.elsewhere})" if method.elsewhere else ""
                raise TqaiError(
                    f"{role} {method.name!r} works at level {', '.join(method.levels)}, asked at {self.level!r}{why}: "
                    f"give level={method.levels[0]!r} or another {role}"
                )
            if method is not None:
                method.check(self.level)
            object.__setattr__(self, role, method.spec if method else "exact" if role == "codec" else None)
        self._check_cache()
        self._check_half_size()
        object.__setattr__(self, "skip_layers", _layers(self.skip_layers))

    def _check_cache(self) -> None:
        for name, default in CACHE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise TqaiError(f"{name}={str(value)[:80]}: give a number of {'layers' if name == 'protect' else 'tokens'}, 0 or more")
            if self.level != "kv" and value == CACHE_BEFORE.get(name):
                object.__setattr__(self, name, default)
            elif self.level != "kv" and value != default:
                raise TqaiError(f"{name} is an option of caches, asked at level {self.level!r}: give level='kv'")
        if not isinstance(self.offload, bool) or (self.offload and self.level != "kv"):
            raise TqaiError(f"offload={str(self.offload)[:80]} at level {self.level!r}: it is true or false, and an option of level 'kv'")
        if self.level != "kv" and "bits_" in self.codec:
            raise TqaiError(
                f"codec {self.codec!r}: bits_k and bits_v are options of caches, asked at level {self.level!r}: give bits=, or level='kv'"
            )

    def _check_half_size(self) -> None:
        value = self.half_size
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise TqaiError(f"half_size={str(value)[:80]}: give a share of signal, from 0 (off) to below 1")
        if value and self.level != "model":
            raise TqaiError(f"half_size={value} is for whole steps, asked at level {self.level!r}: give level='model'")
        object.__setattr__(self, "half_size", float(value))

    def build(self) -> tuple[Scorer | None, Strategy | None, Monitor | None, Codec]:
        """The four methods."""
        return tuple(build(r, s) if (s := getattr(self, r)) else None for r in ROLES)  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        found = {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}
        newer = {"offload", "half_size"}  # older versions do not know them
        return {name: value for name, value in found.items() if value or name not in newer}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """From :meth:`to_dict`, or the pipeline dict people know, with ``scorer_kwargs`` and so on beside the names."""
        if not isinstance(data, Mapping):
            raise TqaiError(f"a config is a dict, got {type(data).__name__}")
        data = dict(data)
        version = data.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:  # before its unknown keys are blamed
            raise TqaiError(f"config version {version}: this tqai reads 1 to {VERSION}; upgrade tqai-core")
        kwargs_of = [f"{role}_kwargs" for role in ROLES]
        known = [f.name for f in fields(cls)]
        if unknown := sorted(map(str, data.keys() - {*known, *kwargs_of})):
            raise TqaiError(f"config has unknown {', '.join(unknown)[:300]}; known: {', '.join(known)} and <stage>_kwargs")
        plain = {key: value.spec if isinstance(value, Method) else _listed(value) for key, value in data.items()}
        checked("Pipeline", plain, what="config", again=AGAIN)
        for role in ROLES:
            if kwargs := data.pop(f"{role}_kwargs", None):
                if not data.get(role):
                    raise TqaiError(f"{role}_kwargs without a {role}: name the {role} too")
                name, options = parse(data[role])
                data[role] = {"name": name, **options, **kwargs}
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls.from_dict(parse_json(text, what="config", again=AGAIN))


def _listed(value: Any) -> Any:
    """Sequences and mappings of every kind as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _listed(part) for key, part in value.items()}
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _layers(given: Any) -> tuple[int | str, ...]:
    """Numbers, ranges and module names, in one order however they were given."""
    layers: set[int | str] = set()
    pieces = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    number, named = r"\d{1,4}", 0  # below MOST_LAYERS: a range is made number by number
    try:
        for piece in pieces:
            text = str(piece).strip()
            named += 1
            if span := re.fullmatch(rf"({number})\s*-\s*({number})", text):
                layers.update(numbers := range(int(span[1]), int(span[2]) + 1))
                named += len(numbers)
            if named > 2 * MOST_LAYERS:
                raise ValueError
            if span:
                continue
            if re.fullmatch(rf"-?{number}", text):
                layers.add(int(text))
            elif isinstance(piece, str) and re.fullmatch(r"[A-Za-z_][\w.]*", text):
                layers.add(text)
            elif text:
                raise ValueError
    except (TypeError, ValueError):
        cure = f'give numbers, ranges or module names, as in (0, "2-4", -1, "blocks.3"), numbers below {MOST_LAYERS:,}'
        raise TqaiError(f"skip_layers={repr(given)[:200]}: {cure}") from None
    return tuple(sorted(layers, key=lambda layer: (isinstance(layer, str), layer)))


PRESETS = ("quality", "balanced", "fast")
FEW, HALF, HIDDEN = "few", "half", 0.2  # a preset for few steps; one whose first steps have half the size, and its half_size
# tolerance of each preset and family, tuned on seeds 100 to 155 of the minis, one picture at a time; figures are of seeds 0 to 63
TAUS = {name: {family.name: family.tolerances[name] for family in FAMILIES.values() if family.tolerances} for name in PRESETS}
KV_PRESETS = ("k8v4", "k6v4", "k5v4", "k5v3", "k4v4", "k4v3", "k4v2", "k3v2", "k2v2")  # bits of keys and values


def preset(name: str = "balanced", family: str | os.PathLike[str] | None = None) -> Config:
    """A ready pipeline: ``quality`` (42 to 46 % of the calls of 24 Euler steps skipped), ``balanced`` (50 to 54 %), ``fast``
    (54 to 58 %).

    ``few`` is for runs of 4 steps to 15, which the others leave exact: from the fourth step on every second one is forecast, the last
    one too unless it is longer than the mean one (docs/few.md). ``half`` is ``balanced`` whose first steps run at half the height and
    width; it wants a model that was trained at both sizes.
    ``k8v4``, ``k6v4``, ``k5v4`` (the default of caches), ``k5v3``, ``k4v4``, ``k4v3``, ``k4v2``, ``k3v2``, ``k2v2``: KV caches with so
    many bits for keys and values. Keys need more: their errors are in every weight, those of values are averaged.
    ``family`` is a name of ``FAMILIES``, or a file ``NAME.json`` of ``tqai tune --family``; without one, or where it was not tuned,
    the strictest tolerance of all families is taken.
    """
    if name in KV_PRESETS and family is None:
        recent = 12 if name.endswith("v2") else CACHE["recent"]  # there each exact token costs as much as many packed ones
        return Config(level="kv", codec={"name": "turbo", "bits_k": int(name[1]), "bits_v": int(name[3])}, recent=recent)
    if name == FEW:
        return Config(monitor="fixed:interval=2,warmup=3,min_steps=4,final=false", codec="exact")
    if name == HALF:
        return replace(preset("balanced", family), half_size=HIDDEN)
    if name not in PRESETS:
        raise TqaiError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}, {FEW}, {HALF}, and for caches {', '.join(KV_PRESETS)}")
    given = "" if family is None else os.fspath(family)
    if given.endswith(".json"):
        tau = entry.read(given).tolerances[name]
    elif family is None or given in FAMILIES:
        tau = TAUS[name].get(given, min(TAUS[name].values()))
    else:
        raise TqaiError(f"unknown family {given!r}; known: {', '.join(FAMILIES)}, a file NAME.json of tqai tune --family, or leave it out")
    return Config(monitor={"name": "lyapunov", "tau": tau})
