"""Where packed caches meet a ComfyUI model. Only frozen settings live in its options; the caches live from OUTER_SAMPLE's start to end.

What the cache nodes left on the model is looked at when sampling starts. So TQAI Cache may come before them or after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from tqai_core.errors import TqaiError

from .cache_run import CacheRun, CacheSettings
from .cache_stores import PackedPairs, PackedSlots, Queries, is_slots, packed_slots
from .page import executing, sender
from .patch import kind_of
from .run_history import HISTORY, Entry
from .wrappers import of_evaluation, of_forward, own_options, settings_of, wrap

KEY, RUN = "tqai_cache", "tqai_cache_run"


def patch_caches(model: Any, settings: CacheSettings) -> Any:
    """A clone of a ModelPatcher whose caches are packed while it samples."""
    if settings_of(model.model_options, KEY) is not None:
        raise TqaiError("this model already went through TQAI Cache: remove one of the two nodes")
    return wrap(model.clone(), KEY, settings, {"OUTER_SAMPLE": _outer_sample, "PREDICT_NOISE": _predict_noise, "APPLY_MODEL": _apply_model})


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """One sampling: packed caches in a copy of the guider's options, gone when it ends, fails or is stopped."""
    guider = executor.class_obj
    settings = settings_of(guider.model_options, KEY)
    if settings is None:
        return executor(*args, **kwargs)
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    run, family = CacheRun(settings, len(sigmas) - 1, sender(settings.node)), kind_of(guider.model_patcher).name
    failed = True
    try:
        with own_options(guider, RUN, run) as options, ExitStack() as undo:
            _pack_slots(options, run)
            _pack_pairs(options, run, undo.callback)
            _pack_prefix(guider.model_patcher.model.diffusion_model, run, undo.callback)
            result = executor(*args, **kwargs)
        failed = False
        return result
    finally:
        report = run.close(failed)
        HISTORY.put(Entry(settings.node, executing(), family, report, not failed, cache=True))
        logging.info("[tqai] %s, cache: %s", family, _told(report))


def _told(report: dict[str, Any]) -> str:
    packed = f"{report['bytes_held_peak'] / 2**20:.1f} MB in place of {report['bytes_exact'] / 2**20:.1f} MB" if report["per_site"] else ""
    return "; ".join(filter(None, [packed, *(f["why"] for f in report["fallbacks"])]))


def _own_bits(cache: Any, run: CacheRun) -> bool:
    """Whether the user chose the host's own bits: they stay."""
    if cache.dtype != "default":
        run.fallback(f"the cache node's dtype is {cache.dtype}: left to it; set it to default to have it packed here")
    return bool(cache.dtype != "default")


def _pack_slots(options: dict[str, Any], run: CacheRun) -> None:
    """WanAnimate2Cache: another cache of the same class in the options."""
    cache = options.get("animate2_cache")
    if is_slots(cache) and not _own_bits(cache, run):
        options["animate2_cache"] = packed_slots(cache, run)


def _pack_pairs(options: dict[str, Any], run: CacheRun, undo: Callable[..., Any]) -> None:
    """FluxKVCache: another dictionary in its patch, which a second patch of that node looks into as well."""
    patches = options.get("patches", {})
    found: list[Any] = []
    for patch in patches.get("attn1_patch", []):
        if type(patch).__name__ == "KV_Attn_Input" and isinstance(getattr(patch, "cache", None), dict):
            before, patch.cache = patch.cache, PackedPairs(run)
            undo(setattr, patch, "cache", before)
            run.stores.append(patch.cache)
            found.append(Queries(patch.cache))
        found.append(patch)
    if found:
        patches["attn1_patch"] = found


def _pack_prefix(inner: Any, run: CacheRun, undo: Callable[..., Any]) -> None:
    """QwenImage21Cache: the model makes its cache at its first forward: it is replaced before anything is put into it."""
    choose = getattr(inner, "select_prefix_cache", None)
    if choose is None:
        return

    def select_prefix_cache(key: Any, cache_bytes: int, *args: Any, **kwargs: Any) -> Any:
        cache, filled = choose(key, cache_bytes * (run.settings.bits_k + run.settings.bits_v) // 32, *args, **kwargs)
        if is_slots(cache) and not isinstance(cache, PackedSlots) and not _own_bits(cache, run):
            cache = inner.prefix_cache = packed_slots(cache, run)
        return cache, filled

    before = vars(inner).get("select_prefix_cache")
    undo(lambda: vars(inner).pop("select_prefix_cache") if before is None else setattr(inner, "select_prefix_cache", before))
    inner.select_prefix_cache = select_prefix_cache


def _poses_differ(poses: Any, run: CacheRun) -> bool:
    """Two pose videos in one batch: the host compares the first one alone, and would read it for both."""
    if not isinstance(poses, torch.Tensor) or bool((poses == poses[:1]).all()):
        return False
    run.fallback("two pose videos in one batch: their steps are computed")
    return True


def _predict_noise(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
    """One evaluation of the sampler."""
    _, run = of_evaluation(args, kwargs, RUN)
    if run is None:
        return executor(x, timestep, *args, **kwargs)
    with run.evaluation():
        return executor(x, timestep, *args, **kwargs)


def _apply_model(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward: which conditions are in its batch, so that none reads what was kept of another."""
    options, run = of_forward(args, kwargs, RUN)
    if run is None:
        return executor(x, t, *args, **kwargs)
    if "animate2_cache" in options and (run.full or _poses_differ(kwargs.get("pose_latents"), run)):
        options.pop("animate2_cache")  # of this forward: it computes the pose branch
    frames = tuple(getattr(options.get("context_window"), "index_list", ()))
    chunks = [(condition, frames) for condition in options.get("uuids") or options.get("cond_or_uncond") or (None,)]
    with ExitStack() as stack:
        for store in run.stores:
            if isinstance(store, PackedPairs):
                stack.enter_context(store.forward(chunks))
        return executor(x, t, *args, **kwargs)
