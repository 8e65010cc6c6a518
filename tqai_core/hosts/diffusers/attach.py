"""tqai on a diffusers pipeline or transformer: checks everything, then sets one hook, and stand-ins for blocks or attention processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn

from ...config import Config
from ...errors import TqaiError
from ...families import family_of
from ...families.base import Family
from ...flow import Flow
from ...handle import Handle
from ...layers import exact_layers
from ...roles import AttentionForecaster, EntropyMonitor
from ...site import probed
from . import kv_caches
from .clock import CallClock, Clock, NoClock, SchedulerClock, denoisers
from .hook import Patch, RootHook
from .sites import ModuleSite
from .stand_ins import stand_in, swap_block
from .token_order import TokenOrder

HOOK = "tqai"


def is_attached(model: Any) -> bool:
    registry = getattr(model, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(HOOK) is not None


def attach(target: Any, config: Config, steps: int | None = None) -> Handle:
    """Hook every transformer of a pipeline, or a bare one. Nothing is changed when this raises."""
    pipe = target if (hasattr(target, "scheduler") or hasattr(target, "components")) and not isinstance(target, nn.Module) else None
    if pipe is None and not isinstance(target, nn.Module):
        raise TqaiError(f"{type(target).__name__} is neither a diffusers pipeline nor a transformer: give one of these")
    models = denoisers(pipe) if pipe is not None else {"transformer": target}
    if config.level == "kv":
        return kv_caches.attach(target, config)
    if not models:
        raise TqaiError(f"{type(target).__name__} has no transformer and no unet: give a pipeline that denoises in steps")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise TqaiError(f"steps={steps!r}: give the number of denoiser evaluations of your loop, 1 or more")
    checked = [(name, model, *_check(name, model, config)) for name, model in models.items()]
    handle = Handle()
    clock: Clock = CallClock(steps) if pipe is None else SchedulerClock(pipe) if hasattr(pipe, "scheduler") else NoClock(pipe)
    for name, model, family, protected in checked:
        for site in _hook(name, model, family, config, handle, clock, protected):
            if hasattr(site.module, "set_processor"):
                _set_processor(site.module, _stand_in(site, {}), handle)
            else:
                handle.on_remove(swap_block(site.module))
    return handle


class Processors(dict[str, Any]):
    """What ``set_attn_processor`` takes. ``handle`` has the report and the undo."""

    handle: Handle


def attn_processors(transformer: Any, config: Config, steps: int | None = None) -> Processors:
    """Processors for ``transformer.set_attn_processor``, one shared object for each class of processor in use."""
    if config.level != "attention":
        raise TqaiError(f"attention processors work at level 'attention', the config says {config.level!r}: give level='attention'")
    if not hasattr(transformer, "attn_processors"):
        raise TqaiError(f"{type(transformer).__name__} has no attention processors: give a diffusers transformer")
    family, protected = _check("transformer", transformer, config)
    before = dict(transformer.attn_processors)
    result, shared = Processors(before), dict[Any, Any]()
    result.handle = handle = Handle()
    sites = _hook("transformer", transformer, family, config, handle, CallClock(steps), protected)
    names = {id(module): name for _, name, module in family.attentions(transformer)}
    for site in sites:
        result[f"{names[id(site.module)]}.processor"] = _stand_in(site, shared)

    def undo() -> None:
        now = transformer.attn_processors
        transformer.set_attn_processor({k: before.get(k, p) if type(p).__name__.startswith("Tqai") else p for k, p in now.items()})

    handle.on_remove(undo)
    return result


def _stand_in(site: ModuleSite, shared: dict[Any, Any]) -> Any:
    """One object for all sites whose processors are alike; weights of a processor's own stay its own."""
    processor, kernel = site.module.processor, site.module._tqai_sparse or site.probes
    made = stand_in(processor, kernel)
    return made if isinstance(processor, nn.Module) else shared.setdefault((type(processor), kernel), made)


def _set_processor(attn: Any, processor: Any, handle: Handle) -> None:
    before = attn.processor
    attn.set_processor(processor)

    def undo() -> None:
        if attn.processor is processor:  # else the host has put in another one since
            attn.set_processor(before)

    handle.on_remove(undo)


def _check(name: str, model: Any, config: Config) -> tuple[Family, set[str]]:
    """The model's family and the names of its modules that must stay exact; TqaiError for what the model does not have."""
    if hasattr(model, "_orig_mod"):
        raise TqaiError(
            f"this {name} is compiled as a whole, and a forecast is made outside of it: call tqai.apply first, then compile its blocks "
            "(transformer.compile_repeated_blocks())"
        )
    family = family_of(model, config.level)
    if is_attached(model):
        raise TqaiError(f"tqai is already applied to this {name}: call handle.remove() first")
    for method in config.build():
        if method is not None:
            method.belongs(model)
    blocks = [block for block, _ in family.layers(model)]
    modules = [module for _, module, _ in family.attentions(model)]
    numbers, names = exact_layers(config.skip_layers, blocks, type(model).__name__, modules=modules)
    return family, names | {blocks[number] for number in numbers}


def _sites(model: Any, family: Family, config: Config, flow: Flow, protected: set[str]) -> list[ModuleSite]:
    """The modules that take part: at level attention and block all of them, and a few that measure what the monitor wants."""
    sites: list[ModuleSite] = []
    if flow.disabled_reason is not None:
        return sites

    def add(site: str, name: str, module: nn.Module, caches: bool, probes: bool) -> None:
        exact = name in protected or name.rsplit(".", 1)[0] in protected
        sites.append(ModuleSite(flow, site, module, caches=caches, probes=probes, protected=exact, text_first=family.text_first))

    if config.level == "block":
        for i, (name, block) in enumerate(family.layers(model)):
            add(f"block.{i}", name, block, caches=True, probes=False)
    attentions = list(family.attentions(model))
    own = [name for site, name, _ in attentions if site.startswith("attn.")]
    measured = {own[i] for i in probed(len(own))} if isinstance(flow.monitor, EntropyMonitor) else set()
    for site, name, module in attentions:
        sparse = config.level == "attention" and isinstance(flow.strategy, AttentionForecaster)
        caches = config.level == "attention" and not (sparse and site.startswith("cross."))
        if caches or name in measured:
            add(site, name, module, caches, name in measured)
            vars(module)["_tqai_sparse"] = sparse
    return sites


def _hook(
    name: str, model: Any, family: Family, config: Config, handle: Handle, clock: Clock, protected: set[str]
) -> list[ModuleSite]:  # fmt: skip
    flow = Flow(config, handle.recorder, name, _agreement(model), allow_new_streams=family.by_scheduler)
    handle.flows.append(flow)
    sites = _sites(model, family, config, flow, protected)
    order = None
    if flow.disabled_reason is None and isinstance(flow.strategy, AttentionForecaster) and flow.strategy.tiles_once:
        order = TokenOrder(model, family, flow, flow.strategy)
        handle.on_remove(order.remove)
    whole = config.level == "model" and bool(protected) and protected.issuperset(block for block, _ in family.layers(model))
    _register(model, RootHook(Patch(flow, family, config, handle, clock, sites, protected, whole, order), model), handle)

    def undo() -> None:
        for site in sites:
            for key in [key for key in vars(site.module) if key.startswith("_tqai_")]:
                delattr(site.module, key)

    handle.on_remove(undo)
    return sites


def _register(model: Any, hook: RootHook, handle: Handle) -> None:
    had_forward, had_registry = "forward" in vars(model), "_diffusers_hook" in vars(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(hook, HOOK)
    ours = model.forward
    registry.invalidate_child_registries_cache()
    lacks_reset = not hasattr(model, "_reset_stateful_cache")  # SD3 has no CacheMixin; pipelines call this after a run
    if lacks_reset:
        model._reset_stateful_cache = lambda: registry.reset_stateful_hooks()

    def undo() -> None:
        outer = vars(model).get("forward")
        registry.remove_hook(HOOK, recurse=False)
        if outer is not ours:  # a hook of another library (accelerate's offload) stands around ours: it stays, ours lets through
            model.forward, hook.fn_ref.forward = outer, hook.fn_ref.original_forward
        registry.invalidate_child_registries_cache()
        if lacks_reset:
            vars(model).pop("_reset_stateful_cache", None)
        if not registry.hooks:
            if not had_forward and outer is ours:
                vars(model).pop("forward", None)
            if not had_registry:
                vars(model).pop("_diffusers_hook", None)

    handle.on_remove(undo)


def _agreement(model: Any) -> Callable[[Tensor], Tensor]:
    """Sums over the ranks of context parallelism, so that all of them decide alike and none waits in a collective."""

    def agree(sums: Tensor) -> Tensor:
        parallel = getattr(model, "_parallel_config", None)
        if parallel is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return sums
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    return agree
