"""Other step caches of diffusion transformers, each behind one call that switches it on and returns its exact undo.

A peer gets what its documentation asks for, and help where a pipeline lacks something that the peer's user could give:
``helped`` tells which. Settings are the peer's own.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tqai_core.types import nbytes

from .spectrum import Fit, Schedule, Spectrum

Undo = Callable[[], None]


def pab(pipe: Any, skip: int = 2, low: int = 100, high: int = 800, cross: int | None = None, per_branch: bool = False) -> Undo:
    """Pyramid Attention Broadcast (arXiv:2408.12588): attention outputs reused ``skip - 1`` times between two timesteps.

    ``per_branch`` is no setting of the peer: it keeps one state for each guidance branch, to measure what the shared one
    costs.
    """
    from diffusers.hooks import PyramidAttentionBroadcastConfig
    from diffusers.hooks import pyramid_attention_broadcast as module

    spans = dict(spatial_attention_timestep_skip_range=(low, high), cross_attention_timestep_skip_range=(low, high))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip, cross_attention_block_skip_range=cross, current_timestep_callback=_timestep(pipe), **spans
    )

    def apply(model: Any) -> None:
        if not per_branch:
            return _enable(model, config, module.apply_pyramid_attention_broadcast)
        original = module.PyramidAttentionBroadcastHook
        module.PyramidAttentionBroadcastHook = _per_branch(original, module.PyramidAttentionBroadcastState)
        try:
            _enable(model, config, module.apply_pyramid_attention_broadcast)
        finally:
            module.PyramidAttentionBroadcastHook = original

    return _hooked(pipe, apply)


def _per_branch(base: Any, state: Any) -> Any:
    from diffusers.hooks.hooks import StateManager

    class PerBranch(base):  # type: ignore[valid-type]
        def initialize_hook(self, module: nn.Module) -> nn.Module:
            self.states = StateManager(state)
            return module

        @property
        def state(self) -> Any:
            return self.states.get_state()

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.states.reset()
            return module

    return PerBranch


def faster_cache(pipe: Any, skip: int = 2, high: int = 681, distilled: bool = False, uncond: int = 5) -> Undo:
    """FasterCache (arXiv:2410.19355). Its guidance mode wants cond and uncond in one batch; ``distilled`` switches it off."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache
    from diffusers.hooks.faster_cache import _UNCOND_COND_INPUT_KWARGS_IDENTIFIERS as inputs

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(-1, high),
        unconditional_batch_skip_range=uncond,
        is_guidance_distilled=distilled,
        tensor_format="BCFHW" if "Wan" in type(pipe).__name__ else "BCHW",
        current_timestep_callback=_timestep(pipe),
        _unconditional_conditional_input_kwargs_identifiers=[*inputs, "pooled_projections"],
    )
    return _hooked(pipe, lambda model: _enable(model, config, apply_faster_cache))


def first_block(pipe: Any, threshold: float = 0.05) -> Undo:
    """First Block Cache (ParaAttention, after TeaCache arXiv:2411.19108): the first block decides on all others."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    return _hooked(pipe, lambda model: _enable(model, FirstBlockCacheConfig(threshold), apply_first_block_cache))


def mag_cache(
    pipe: Any, threshold: float = 0.06, skips: int = 3, retention: float = 0.2, ratios: list[float] | None = None, steps: int = 24
) -> Undo:
    """MagCache (arXiv:2506.09045): skips by the calibrated ratio of successive residuals; ``ratios=None`` calibrates."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCacheConfig(threshold, skips, retention, steps, None if ratios is None else torch.tensor(ratios), ratios is None)
    return _hooked(pipe, lambda model: _enable(model, config, apply_mag_cache))


def calibrated_ratios(pipe: Any, generate: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's ratios from its own calibration mode over ``generate()``: the mean over what it prints, one list a branch."""
    undo, printed = mag_cache(pipe, steps=steps), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            generate()
    finally:
        undo()
    lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[") and not line.startswith("[Mag")]
    if not lists:
        raise ValueError(f"MagCache printed no ratios after {steps} steps: calibrate with the number of steps that is run")
    return [sum(column) / len(lists) for column in zip(*lists, strict=True)]


def taylor_seer(
    pipe: Any, interval: int = 5, order: int = 1, lite: bool = False, own_names: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Undo:
    """TaylorSeer (arXiv:2503.06923): attention outputs (``lite``: the whole model's) as a Taylor series over steps.

    ``own_names`` gives the pattern of the attention modules, which its default misses on WAN.
    """
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    names = [r"(single_)?(transformer_)?blocks\.\d+\.attn\d?"] if own_names else None
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, taylor_factors_dtype=dtype, use_lite_mode=lite, cache_identifiers=names
    )
    return _hooked(pipe, lambda model: _enable(model, config, apply_taylorseer_cache))


def sea_cache(pipe: Any, threshold: float = 0.25, order: int = 1, latents: Callable[[Tensor], Tensor] | None = None) -> Undo:
    """SeaCache (arXiv:2602.18993): a spectral filter of the latents decides. ``latents`` shapes the model's input as
    ``[n, c, frames, h, w]`` where SeaCache cannot."""
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    look = None if latents is None else lambda module, args, kwargs: list(latents(kwargs["hidden_states"]).unbind(0))
    config = SeaCacheConfig(threshold=threshold, residual_order=order, raw_vision_callback=look)
    return _hooked(pipe, lambda model: _enable(model, config, apply_sea_cache))


def db_cache(
    pipe: Any, threshold: float = 0.08, warmup: int = 3, running: int = -1, taylor: bool = False, separate: bool | None = None,
    steps: int = 24,
) -> Undo:  # fmt: skip
    """cache-dit's DBCache, one block computed always; ``taylor`` adds its TaylorSeer calibrator. ``separate`` says whether
    guidance is two calls; None leaves that to cache-dit."""
    with quiet():
        cache_dit = importlib.import_module("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=warmup,
        max_continuous_cached_steps=running, enable_separate_cfg=separate, num_inference_steps=steps,
    )  # fmt: skip
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    cls, model = type(pipe), pipe.transformer
    call, before = cls.__call__, (set(vars(cls)), set(vars(pipe)), set(vars(model)), {id(m): set(vars(m)) for m in model.modules()})

    order = list(model._modules)

    def undo() -> None:
        with contextlib.suppress(Exception), quiet():  # after a failed run it may not find its own traces
            cache_dit.disable_cache(pipe)
        cls.__call__ = call
        for thing, names in ((cls, before[0]), (pipe, before[1]), (model, before[2])):
            for name in set(vars(thing)) - names:
                delattr(thing, name)
        for module in model.modules():
            for name in set(vars(module)) - before[3].get(id(module), set()):
                delattr(module, name)
        # it swaps the block lists by mock.patch, which puts them back in another order: caches that take the first and the
        # last block by that order (MagCache, FirstBlockCache, SeaCache) are wrong on Flux afterwards
        model._modules.update({name: model._modules.pop(name) for name in order})

    try:
        with quiet():
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    except BaseException:
        undo()
        raise
    return undo


def spectrum(pipe: Any, keep: int = 24, schedule: Schedule | None = None, **fit: float) -> Undo:
    """Spectrum (arXiv:2603.01623) in a form of ours: :mod:`bench.spectrum` says what is the paper's and what is assumed."""
    model = pipe.transformer
    model.forward = Spectrum(pipe.scheduler, model.forward, schedule or Schedule(), Fit(**fit), keep)  # type: ignore[arg-type]
    return lambda: vars(model).pop("forward", None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and warnings of peers; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def absent() -> dict[str, str]:
    """Caches that the installed diffusers does not have."""
    import diffusers
    from diffusers import hooks

    names = {
        "PAB": "PyramidAttentionBroadcastConfig", "FasterCache": "FasterCacheConfig", "FirstBlockCache": "FirstBlockCacheConfig",
        "MagCache": "MagCacheConfig", "TaylorSeer": "TaylorSeerCacheConfig", "SeaCache": "SeaCacheConfig", "TeaCache": "TeaCacheConfig",
    }  # fmt: skip
    return {name: f"not in diffusers {diffusers.__version__}" for name, config in names.items() if not hasattr(hooks, config)}


def context(pipe: Any) -> Undo:
    """Tell caches the branch, step and sigma where a pipeline does not: SD3 sets no cache context at all, Flux names the
    branch alone. To be called before the peer is switched on."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model = pipe.transformer

    def where() -> dict[str, Any]:
        at = pipe.scheduler.step_index or 0
        return {"step_index": at, "sigma": float(pipe.scheduler.sigmas[at]), "num_inference_steps": len(pipe.scheduler.timesteps)}

    if hasattr(type(model), "cache_context"):
        original = model.cache_context
        model.cache_context = lambda name, **kw: original(name, **{**where(), **kw})
        return lambda: vars(model).pop("cache_context", None)
    had = "_diffusers_hook" in vars(model)
    handle = model.register_forward_pre_hook(lambda module, args: _set_cache_context(module, CacheContext("both", **where())))

    def undo() -> None:
        handle.remove()
        if not had:
            vars(model).pop("_diffusers_hook", None)

    return undo


def held(pipe: Any) -> int:
    """Bytes of the distinct tensors that peers hold right now, walked through their hooks and contexts."""
    roots: list[Any] = [getattr(pipe, "_context_manager", None)]
    roots += [own.outputs] if isinstance(own := pipe.transformer.forward, Spectrum) else []
    for module in pipe.transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None:
            roots += [vars(hook) for hook in registry.hooks.values()]
    return nbytes(list(_tensors(roots, set())))


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor under ``thing``, through objects that may point at each other; models and functions are no state."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if thing is None or id(thing) in seen or isinstance(thing, (str, int, float, type, nn.Module)) or callable(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inner = list(thing)
    else:
        inner = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    for value in inner:
        yield from _tensors(value, seen)


def _timestep(pipe: Any) -> Callable[[], float]:
    """The current timestep: the pipeline's own word, the scheduler's where the pipeline has none (SD3)."""

    def now() -> float:
        if hasattr(type(pipe), "current_timestep"):
            return float(pipe.current_timestep)
        return float(pipe.scheduler.timesteps[pipe.scheduler.step_index or 0])

    return now


def _enable(model: Any, config: Any, apply: Callable[[Any, Any], None]) -> None:
    """The documented way; SD3 has no ``enable_cache``."""
    if hasattr(model, "enable_cache"):
        model.enable_cache(config)
    else:
        apply(model, config)


def _hooked(pipe: Any, apply: Callable[[Any], None]) -> Undo:
    """Run ``apply`` and return what takes away every hook it left, whatever happened since."""
    from diffusers.hooks.hooks import HookRegistry

    model = pipe.transformer
    before = {id(m): (set(vars(m)), set(_hooks(m))) for m in model.modules()}
    cached = getattr(model, "_cache_config", None)

    def undo() -> None:
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        for module in model.modules():
            names, hooks = before[id(module)]
            for hook in [name for name in reversed(_hooks(module)) if name not in hooks]:
                module._diffusers_hook.remove_hook(hook, recurse=False)
            for name in {"forward", "_diffusers_hook"} & set(vars(module)) - names:
                delattr(module, name)
        if getattr(model, "_cache_config", None) is not cached:
            model._cache_config = cached
        if "_cache_config" not in before[id(model)][0]:
            vars(model).pop("_cache_config", None)

    try:
        with quiet():
            apply(model)
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    except BaseException:
        undo()
        raise
    return undo


def _hooks(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry._hook_order)
