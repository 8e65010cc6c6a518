"""What the hosts of language models share: which layers are packed, what a cache counts and reports, and the handle that makes caches."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import Config
from ..errors import TqaiError
from ..handle import Handle
from ..kv.calibrated import CacheCalibration, load
from ..kv.segments import Plan, flush
from ..layers import exact_layers
from ..registry import build
from ..report import Report


def kv_config(config: Config | None, who: str) -> Config:
    """``config``, or the default of level kv. TqaiError, which begins with ``who``, for every other kind of configuration."""
    config = Config(level="kv") if config is None else config
    if not isinstance(config, Config) or config.level != "kv":
        raise TqaiError(f"{who} a tqai.Config(level='kv', ...), got {getattr(config, 'level', type(config).__name__)!r}")
    if config.offload:
        raise TqaiError("offload=True is for the caches of diffusion transformers, this is a language model: leave it out")
    return config


def layer_plans(config: Config, own_forms: Sequence[str]) -> list[Plan | str]:
    """The plan of each layer, or the reason why it stays exact.

    ``own_forms`` has a text for each layer: the class of its cache where that cannot be packed (a sliding window, a state
    space), "" where it can.
    """
    codec: Any = build("codec", config.codec)
    names = [f"model.layers.{i}" for i in range(len(own_forms))]
    skip, _ = exact_layers(config.skip_layers, names, "this model", noun="layers", by_number=True)
    full = [i for i, form in enumerate(own_forms) if not form]
    edge = min(config.protect, len(full) // 8)  # layers at either end that are held at 8 bits
    strong = {*full[:edge], *full[len(full) - edge :]}

    shared: list[tuple[int, int]] = []
    if (known := calibrated(config)) is not None:
        known.check_layers(len(own_forms))
        shared = known.bits(codec.average or codec.bits)

    def plan(i: int) -> Plan | str:
        if codec.name == "exact":
            return "codec exact"
        if i in skip:
            return "skip_layers"
        if own_forms[i]:
            return f"{own_forms[i]} keeps its own form"
        asked = (codec.bits_k or codec.bits, codec.bits_v or codec.bits) if not shared else shared[i]
        bits_k, bits_v = (max(bits, 8 if i in strong else 0) for bits in asked)
        return Plan(bits_k, bits_v, config.sink, config.recent, config.calibrate, codec.seed)

    return [plan(i) for i in range(len(own_forms))]


def calibrated(config: Config) -> CacheCalibration | None:
    """What the calibration file of a configuration says of caches, if it names one."""
    file = getattr(build("codec", config.codec), "file", "")
    return load(file) if file else None


@dataclass
class Usage:
    """What a cache counts. The cache and its packed layers hold one object together, so that a deep copy counts for itself."""

    calls: int = 0  # of packed layers
    evaluations: int = 0  # of the model
    peak: int = 0  # bytes
    seconds: float = 0.0  # CPU, from the first evaluation to the last
    warnings: list[str] = field(default_factory=list)
    first: int | None = None  # the layer that the model calls first
    began: float = 0.0

    def count(self, layer: int) -> bool:
        """One call of a layer. True where it begins an evaluation of the model."""
        self.calls += 1
        if self.first is None:
            self.first, self.began = layer, time.process_time()
        if layer != self.first:
            return False
        self.seconds, self.evaluations = time.process_time() - self.began, self.evaluations + 1
        return True

    def warn(self, text: str) -> None:
        """Warn once."""
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(f"tqai: {text}", UserWarning, stacklevel=2)


@dataclass(frozen=True)
class LayerFigures:
    """What the report says of a packed layer."""

    index: int
    plan: Plan
    tokens: int
    packed: int  # of the tokens
    nbytes: int
    exact: Sequence[Any]  # some keys and some values [B, H, n, D], for their shapes; empty where there were none yet
    decoded: int = 0  # times that dense keys or values were made

    @property
    def numbers(self) -> int:
        """How many numbers the keys and values of all tokens are."""
        return self.tokens * sum(x.shape[0] * x.shape[1] * x.shape[3] for x in self.exact)

    def row(self) -> dict[str, Any]:
        bits = round(8 * self.nbytes / self.numbers, 4) if self.numbers else 0.0
        return {
            "bits_k": self.plan.bits_k, "bits_v": self.plan.bits_v, "tokens": self.tokens, "tokens_packed": self.packed,
            "bytes_held": self.nbytes, "bits_held": bits, "materialised": self.decoded,
        }  # fmt: skip


def packing_starts(config: Config) -> int:
    """Tokens, padding not counted, at which the first of them are packed."""
    return max(config.calibrate, config.sink + config.recent + flush(config.recent))


def cache_report(config: Config, plans: Sequence[Plan | str], usage: Usage, layers: Sequence[LayerFigures], others: int) -> Report:
    """The report of a cache. ``others``: how many numbers its layers hold that are not packed."""
    report = Report(calls=usage.calls, evaluations=usage.evaluations, seconds_cpu=usage.seconds, bytes_held_peak=usage.peak)
    report.bytes_exact = 2 * (others + sum(layer.numbers for layer in layers))
    report.per_site = {f"attn.{layer.index}": layer.row() for layer in layers}
    report.warnings = list(usage.warnings)
    report.fallbacks = [{"where": f"attn.{i}", "why": plan} for i, plan in enumerate(plans) if isinstance(plan, str)]
    if usage.evaluations and layers and not any(layer.packed for layer in layers):
        start = packing_starts(config)
        report.warnings.append(
            f"nothing is packed yet: {layers[0].tokens} tokens are held, packing starts at {start}; it saves memory from there on, time "
            f"from some {PAYS:,} tokens on"
        )
    return report


PAYS = 4000  # tokens from which a step of a whole model is faster than on dense keys and values (`tqai bench llm`)
C = TypeVar("C")


class CacheHandle(Handle):
    """A language model under tqai. ``cache()`` makes caches for the argument of the library that takes them."""

    argument: str

    def __init__(self, model: Any, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._last: Any = None
        self._report = Report(warnings=[f"nothing has run yet: handle.cache() makes a cache for {self.argument}="])

    def keep(self, cache: C) -> C:
        """Count ``cache`` as the handle's own, its newest."""
        self._caches[id(cache)] = self._last = cache
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes held by all living caches of this handle."""
        return sum(cache.nbytes for cache in self._caches.values())

    def report(self) -> Report:
        """Of the newest cache, which the handle holds until it is removed."""
        return self._last.report() if self._last is not None else self._report

    def remove(self) -> None:
        self._report, self._last = self.report(), None
        super().remove()
