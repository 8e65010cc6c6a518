"""Whole models of mlx-lm: their prompt caches, and the handle that makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models import cache as caches

from ...config import Config
from ...errors import TqaiError
from ...files import check_head
from ...kv.segments import AGAIN, Plan
from ...report import Report
from ..language import CacheHandle, LayerFigures, Usage, cache_report, calibrated, kv_config, layer_plans
from .cache import PackedKVCache, hook


class PromptCache(list[Any]):
    """What ``prompt_cache=`` takes: a list of one cache a layer, with bytes and report."""

    def __init__(self, layers: Iterable[Any], config: Config, plans: list[Plan | str]) -> None:
        super().__init__(layers)
        self.config, self.plans, self.usage = config, plans, Usage()
        for i, layer in self.packed_layers:
            layer.usage, layer.index = self.usage, i

    @property
    def packed_layers(self) -> list[tuple[int, PackedKVCache]]:
        return [(i, layer) for i, layer in enumerate(self) if isinstance(layer, PackedKVCache)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, walked."""
        return sum(layer.nbytes for layer in self)

    def report(self) -> Report:
        """The keys of ``tqai.KVCache.report()``, since the cache was made."""
        others = [layer for layer in self if not isinstance(layer, PackedKVCache)]
        self.usage.peak = sum(max(layer.peak, layer.nbytes) for _, layer in self.packed_layers) + sum(layer.nbytes for layer in others)
        numbers = sum(x.size for _, x in tree_flatten([layer.state for layer in others]) if isinstance(x, mx.array))
        figures = [LayerFigures(i, x.plan, x.offset, x.packed, x.nbytes, x.tail or ()) for i, x in self.packed_layers]
        report = cache_report(self.config, self.plans, self.usage, figures, numbers)
        for i, layer in self.packed_layers:
            if not (layer.keys.all_finite and layer.values.all_finite):
                report.warnings.append(f"attn.{i}: keys or values hold NaN or inf, as the exact cache's would")
        return report


def make_prompt_cache(model: Any, config: Config | None = None) -> PromptCache:
    """A packed cache for ``prompt_cache=`` of mlx-lm's ``generate`` and ``stream_generate``, its layers as ``tqai.KVCache`` makes them.

    Layers that are no plain ``KVCache`` (rotating windows, state spaces) keep mlx-lm's own classes, and so do ``skip_layers``.
    Raises TqaiError for a model whose attention does not go through mlx-lm's own function, or a head dimension that is
    no multiple of 32. One sequence length for the whole batch: mlx-lm's batched server is not for it.
    """
    config = kv_config(config, "make_prompt_cache wants")
    if calibrated(config) is not None:
        raise TqaiError(f"codec {config.codec!r}: caches of mlx-lm read no calibration file; give bits_k and bits_v")
    if methods := [name for name in ("scorer", "strategy", "monitor") if getattr(config, name)]:
        raise TqaiError(f"{' and '.join(methods)} asked: caches of mlx-lm are packed only; leave them out, or use transformers")
    if not hasattr(model, "layers"):
        raise TqaiError(f"make_prompt_cache wants a model of mlx_lm.load, got {type(model).__name__}")
    _check(model)
    layers = caches.make_prompt_cache(model)
    plans = layer_plans(config, ["" if type(layer) is caches.KVCache else type(layer).__name__ for layer in layers])
    for i, plan in enumerate(plans):
        if isinstance(plan, Plan):
            rope = getattr(getattr(model.layers[i], "self_attn", None), "rope", None)
            layers[i] = PackedKVCache(plan, interleaved=bool(getattr(rope, "traditional", False)))
    return PromptCache(layers, config, plans)


def _check(model: Any) -> None:
    homes = [sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__.startswith("mlx_lm.models.")]
    names = {type(layer).__module__ for layer in model.layers if layer is not None}
    homes += [sys.modules[name] for name in names if name in sys.modules]
    ours = base.scaled_dot_product_attention
    if not any(getattr(home, "scaled_dot_product_attention", None) is ours for home in homes):
        raise TqaiError(f"{type(model).__module__} does not attend through mlx_lm.models.base: use mlx-lm's own cache for this model")
    if any("sinks" in getattr(layer, "self_attn", {}) for layer in model.layers):
        raise TqaiError(f"{type(model).__module__} has attention sinks of its own, which mlx-lm's quantised attention refuses")


def load_prompt_cache(path: str | Path, model: Any = None) -> PromptCache:
    """What ``mlx_lm.models.cache.save_prompt_cache`` wrote of a packed cache. TqaiError for a damaged file or another model's."""
    known = vars(caches)
    had = known.get("PackedKVCache")
    known["PackedKVCache"] = PackedKVCache  # mlx-lm looks classes up by name in its own module
    try:
        check_head(path, what="prompt cache", again=AGAIN)
        layers = caches.load_prompt_cache(str(path))
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, OSError) as error:
        raise TqaiError(f"{path}: not a readable prompt cache ({str(error)[:300]}): {AGAIN}") from None
    finally:
        if had is None:
            del known["PackedKVCache"]
    if model is not None and len(layers) != len(model.layers):
        raise TqaiError(
            f"{path}: a cache of {len(layers)} layers, the model has {len(model.layers)}: load it with the model that filled it"
        )
    plans = [x.plan if isinstance(x, PackedKVCache) else f"{type(x).__name__} keeps its own form" for x in layers]
    p = next((plan for plan in plans if isinstance(plan, Plan)), Plan())
    codec = {"name": "turbo", "bits_k": p.bits_k, "bits_v": p.bits_v, "seed": p.seed}
    return PromptCache(layers, Config(level="kv", sink=p.sink, recent=p.recent, calibrate=p.calibrate, codec=codec), plans)


class MLXHandle(CacheHandle):
    """What ``tqai.apply`` returns for a model of mlx-lm. ``cache()`` makes caches for ``prompt_cache=``."""

    argument = "prompt_cache"

    def cache(self) -> PromptCache:
        return self.keep(make_prompt_cache(self.model, self.config))


def attach(model: Any, config: Config, steps: int | None = None) -> MLXHandle:
    """Caches that still live after ``remove`` keep the hook, through which everything else goes unchanged."""
    make_prompt_cache(model, kv_config(config, f"{type(model).__name__} is a language model and takes"))  # says what cannot be packed
    handle, held = MLXHandle(model, config), [hook()]
    handle.on_remove(held.clear)
    return handle
