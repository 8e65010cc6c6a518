"""diffusers: one root hook a transformer that knows step, sigma, branch and expert, and asks the flow."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config import Config
from ...errors import TqaiError
from ...families import flux, sd3, wan
from ...families.base import Family
from ...flow import Flow
from ...handle import Handle
from ...roles import AttentionForecaster, EntropyMonitor
from ...types import Step, Where
from .processors import OBSERVE, Site, stand_in, swap_block
from .token_order import Laid

PROBES = 4  # attentions whose entropy is watched
HOOK = "tqai"
FAMILIES: tuple[Family, ...] = (sd3.FAMILY, flux.FAMILY, wan.FAMILY)
EXPERTS = ("transformer", "transformer_2")


def family_of(transformer: Any) -> Family:
    """The family of a transformer, by the names of its class and its bases."""
    mro = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES:
        if mro & set(family.classes):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise TqaiError(f"{type(transformer).__name__} is no transformer tqai knows; known: {known}")


def attach(target: Any, config: Config, steps: int | None = None) -> Handle:
    """Hook every transformer of a pipeline, or a bare one. Nothing is changed when this raises."""
    pipe = target if hasattr(target, "scheduler") and not isinstance(target, nn.Module) else None
    if pipe is None and not isinstance(target, nn.Module):
        raise TqaiError(f"{type(target).__name__} is neither a diffusers pipeline nor a transformer: give one of these")
    found = {name: getattr(pipe, name, None) for name in EXPERTS} if pipe is not None else {"transformer": target}
    models = {name: model for name, model in found.items() if model is not None}
    if not models:
        raise TqaiError(f"{type(target).__name__} has no transformer: tqai works on SD3, Flux and WAN pipelines")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise TqaiError(f"steps={steps!r}: give the number of denoiser evaluations of your loop, 1 or more")
    families = {name: family_of(model) for name, model in models.items()}
    protected = {name: _check(name, model, families[name], config) for name, model in models.items()}
    handle = Handle()
    clock: Clock = SchedulerClock(pipe) if pipe is not None else CallClock(steps)
    for name, model in models.items():
        sites = _hook(name, model, families[name], config, handle, clock, protected[name])
        for site in sites:
            if isinstance(site.module, nn.Module) and hasattr(site.module, "set_processor"):
                _take(site.module, _stand_in(site, {}), handle)
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
    family = family_of(transformer)
    protected = _check("transformer", transformer, family, config)
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


def _stand_in(site: Site, shared: dict[Any, Any]) -> Any:
    """One object for all sites whose processors are alike; weights of a processor's own stay its own."""
    processor, kernel = site.module.processor, site.module._tqai_sparse or site.probes
    if isinstance(processor, nn.Module):
        return stand_in(processor, kernel)
    key = type(processor), kernel
    if key not in shared:
        shared[key] = stand_in(processor, kernel)
    return shared[key]


def _take(attn: Any, processor: Any, handle: Handle) -> None:
    before = attn.processor
    attn.set_processor(processor)

    def undo() -> None:
        if attn.processor is processor:  # else the host has put in another one since
            attn.set_processor(before)

    handle.on_remove(undo)


def _check(name: str, model: Any, family: Family, config: Config) -> set[str]:
    """Names of the modules that must stay exact; ValueError for what the model does not have."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK) is not None:
        raise TqaiError(f"tqai is already applied to this {name}: call handle.remove() first")
    for method in config.build():
        if method is not None:
            method.belongs(model)
    blocks = [block for block, _ in family.layers(model)]
    modules = [module for _, module, _ in family.attentions(model)]
    depth = len(blocks)
    chosen: set[str] = set()
    for layer in config.skip_layers:
        if isinstance(layer, int) and -depth <= layer < depth:
            chosen.add(blocks[layer])
        elif layer in blocks or layer in modules:
            chosen.add(str(layer))
        else:
            raise TqaiError(
                f"skip_layers {layer!r} asked, but {type(model).__name__} has {depth} blocks: use 0 to {depth - 1}, -{depth} to -1, "
                f"or a name such as {blocks[0]!r} or {modules[0]!r}"
            )
    return chosen


def _sites(model: Any, family: Family, config: Config, flow: Flow, protected: set[str]) -> list[Site]:
    """The modules that take part: at level attention and block all of them, and a few that measure what the monitor wants."""
    sites: list[Site] = []
    make = lambda site, name, module, **kw: sites.append(  # noqa: E731
        Site(flow, site, module, protected=name in protected or name.rsplit(".", 1)[0] in protected, text_first=family.text_first, **kw)
    )
    if flow.disabled_reason is None and config.level == "block":
        for i, (name, block) in enumerate(family.layers(model)):
            make(f"block.{i}", name, block, caches=True, probes=False)
    attentions = list(family.attentions(model))
    probed: set[str] = set()
    if flow.disabled_reason is None and isinstance(flow.monitor, EntropyMonitor):
        own = [name for site, name, _ in attentions if site.startswith("attn.")]
        probed = {own[round(i * (len(own) - 1) / max(PROBES - 1, 1))] for i in range(PROBES)} if own else set()
    at_attention = flow.disabled_reason is None and config.level == "attention"
    for site, name, module in attentions:
        sparse = at_attention and isinstance(flow.strategy, AttentionForecaster)
        caches = at_attention and not (sparse and site.startswith("cross."))
        if caches or name in probed:
            make(site, name, module, caches=caches, probes=name in probed)
            vars(module)["_tqai_sparse"] = sparse
    return sites


def _hook(name: str, model: Any, family: Family, config: Config, handle: Handle, clock: Clock, protected: set[str]) -> list[Site]:
    from diffusers.hooks.hooks import HookRegistry

    had_forward, had_registry = "forward" in vars(model), "_diffusers_hook" in vars(model)
    flow = Flow(config, handle.recorder, name, _agreement(model))
    handle.flows.append(flow)
    sites = _sites(model, family, config, flow, protected)
    laid = None
    if flow.disabled_reason is None and isinstance(flow.strategy, AttentionForecaster) and flow.strategy.tiles_once:
        laid = Laid(model, family, flow, flow.strategy)
        handle.on_remove(laid.remove)
    depth = len(family.layers(model))
    whole = config.level == "model" and len({block for block, _ in family.layers(model)} & protected) == depth
    registry = HookRegistry.check_if_exists_or_initialize(model)
    hook = _root_hook(flow, family, handle, clock, config, protected, whole, sites, laid)
    registry.register_hook(hook, HOOK)
    ours = model.forward
    registry.invalidate_child_registries_cache()
    lacks_reset = not hasattr(model, "_reset_stateful_cache")  # SD3 has no CacheMixin; pipelines call this after a run
    if lacks_reset:
        model._reset_stateful_cache = lambda: registry.reset_stateful_hooks()

    def undo() -> None:
        for site in sites:
            for key in [key for key in vars(site.module) if key.startswith("_tqai_")]:
                delattr(site.module, key)
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
    return sites


@dataclass(frozen=True)
class Tick:
    """Where the sampler is. ``key`` is the same for all calls of one evaluation."""

    key: Any
    step: Step
    fresh: bool  # first evaluation of a new generation
    bypass: str | None = None


class Clock:
    def tick(self, timestep: Any, family: Family, context: Any) -> Tick:
        raise NotImplementedError


class SchedulerClock(Clock):
    """Reads the pipeline's scheduler: no host sync, right for bf16 timesteps, UniPC, DPM++ and cut schedules."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.timesteps: Any = None
        self.start = 0

    def tick(self, timestep: Any, family: Family, context: Any) -> Tick:
        scheduler = self.pipe.scheduler
        fresh = scheduler.timesteps is not self.timesteps  # every generation calls set_timesteps
        if fresh:
            self.timesteps = scheduler.timesteps
            sigmas = getattr(scheduler, "sigmas", None)
            self.sigmas = [] if sigmas is None else torch.as_tensor(sigmas).float().cpu().tolist()
            self.start = self._position(timestep, family, first=True)
        at = self._position(timestep, family)
        total = len(self.timesteps) - self.start
        bypass = None
        if getattr(scheduler, "order", 1) != 1:
            bypass = f"{type(scheduler).__name__} evaluates a step {scheduler.order} times: skipping is proven for one evaluation a step"
        elif len(self.sigmas) < len(self.timesteps):
            bypass = f"{type(scheduler).__name__} has no sigmas: use a flow-matching scheduler"
        sigma = self.sigmas[at] if at < len(self.sigmas) else 0.0
        euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.get("stochastic_sampling", False)
        after = self.sigmas[at + 1] if euler and at + 1 < len(self.sigmas) else None
        return Tick(at, Step(at, sigma, total, at == len(self.timesteps) - 1, self._width(at), after), fresh, bypass)

    def _width(self, at: int) -> float:
        """The step from here relative to the mean step of the schedule."""
        if at + 1 >= len(self.sigmas) or self.sigmas[self.start] <= self.sigmas[-1]:
            return 1.0
        mean = (self.sigmas[self.start] - self.sigmas[-1]) / (len(self.sigmas) - 1 - self.start)
        return abs(self.sigmas[at] - self.sigmas[at + 1]) / mean

    def _position(self, timestep: Any, family: Family, first: bool = False) -> int:
        scheduler = self.pipe.scheduler
        if scheduler.step_index is not None and not first:
            return min(int(scheduler.step_index), len(self.timesteps) - 1)
        if getattr(scheduler, "begin_index", None) is not None:
            return int(scheduler.begin_index)
        if not first:
            return self.start
        now = family.sigma(timestep) * 1000.0  # schedulers count in thousandths
        return int((self.timesteps.float().cpu() - now).abs().argmin())


class CallClock(Clock):
    """A loop of the user's own: a new timestep is a new evaluation, a larger one a new generation."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.sigma: float | None = None
        self.index = -1

    def tick(self, timestep: Any, family: Family, context: Any) -> Tick:
        sigma = family.sigma(timestep)
        position, total = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None) or self.steps
        fresh = self.sigma is None or sigma > self.sigma + 1e-6 or (total is not None and self.index + 1 >= total and sigma != self.sigma)
        if fresh:
            self.index = 0
        elif sigma != self.sigma:
            self.index += 1
        self.sigma = sigma
        at = self.index if position is None else position
        bypass = None if total else "the last step is unknown: give apply(transformer, config, steps=N)"
        return Tick(at, Step(at, sigma, total, total is not None and at == total - 1), fresh, bypass)

    def forget(self) -> None:
        self.sigma = None


def _root_hook(
    flow: Flow, family: Family, handle: Handle, clock: Clock, config: Config, protected: set[str], whole: bool, sites: list[Site],
    laid: Laid | None,
) -> Any:  # fmt: skip
    """Made in a function so that this module can be read without diffusers."""
    from diffusers.hooks.hooks import BaseState, ModelHook, StateManager

    class Nothing(BaseState):
        def reset(self, *args: Any, **kwargs: Any) -> None:
            pass

    class RootHook(ModelHook):
        """Step, branch and expert of a call; then the flow has the word."""

        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.context = StateManager(Nothing)  # diffusers puts the cache context here
            self.found: SchedulerClock | None = None  # of the pipeline that calls a bare transformer
            self.restart()

        def restart(self) -> None:
            self.key: Any = None
            self.branches: Counter[str] = Counter()
            self.before: str | None = None  # the branch that ran before in this step
            self.output: Any = None

        def reset_state(self, module: nn.Module) -> nn.Module:
            """The pipeline's word that a generation is over."""
            self.context.reset()
            self._finish()
            handle.recorder.end()
            return module

        def _finish(self) -> None:
            flow.end()
            self.restart()
            self._forget_text()
            for site in sites:
                site.disarm()
            if isinstance(clock, CallClock):
                clock.forget()
            for scheduled in (clock, self.found):
                if isinstance(scheduled, SchedulerClock):
                    scheduled.timesteps = None
            self.found = None

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            compute: Callable[..., Any] = self.fn_ref.original_forward
            try:
                return self._through(module, compute, args, kwargs)
            except BaseException:  # also KeyboardInterrupt: a broken run leaves nothing behind
                self._finish()
                raise

        def _through(self, module: nn.Module, compute: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            if "timestep" not in kwargs:
                handle.recorder.fallback(flow.model, "timestep was not given by keyword, so the step is unknown")
                return compute(*args, **kwargs)
            context = self.context._context
            tick = self._clock(module).tick(kwargs["timestep"], family, context)
            if tick.fresh:
                handle.recorder.end()
                handle.recorder.begin()
                self._look(module)
            if self.key is None or tick.fresh or tick.key != self.key:
                if self.key is None or tick.fresh:
                    for other in handle.flows:  # the other expert's memory is of no more use
                        other.begin()
                    flow.begin(tick.bypass or ("all blocks are in skip_layers" if whole else None))
                    flow.memory.grid = family.grid(module, kwargs)
                    self._forget_text()
                self.key, self.branches, self.before = tick.key, Counter(), None
                flow.enter(tick.step)
            name = getattr(context, "name", None) or "call"
            self.branches[name] += 1
            nth = self.branches[name]
            branch = name if nth == 1 and context is not None else f"{name}{nth - 1}"
            before, self.before = self.before, branch
            if config.level != "model":
                return self._armed(branch, before, compute, args, kwargs)
            kept: list[Any] = []

            def run() -> Tensor:
                out = self._armed(branch, before, compute, args, kwargs)
                kept.append(out)
                return out[0]

            if context is None and flow.guidance.on and getattr(getattr(clock, "pipe", None), "do_classifier_free_guidance", False):
                x = self._halves(run, compute, args, kwargs)
            else:
                x = flow.apply(Where("model", branch), run, Where("model", before) if before else None)
            if kept:
                self.output = type(kept[0])
                return kept[0] if x is kept[0][0] else self._wrap(x, kwargs)
            return self._wrap(x, kwargs)

        def _wrap(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
            if not kwargs.get("return_dict", True) or self.output is None or issubclass(self.output, tuple):
                return (x,)
            return self.output(sample=x)

        def _halves(self, run: Callable[[], Tensor], compute: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Tensor:
            """SD3 runs [uncond; cond] as one batch: two streams, and half a batch where the difference is forecast."""
            uncond, cond = Where("model", "uncond"), Where("model", "cond")
            if flow.should_skip(uncond) and flow.should_skip(cond):
                return torch.cat([flow.forecast(uncond), flow.forecast(cond)])
            if flow.guidance.ready(uncond):
                size = len(kwargs["hidden_states"])
                half = {k: v[size // 2 :] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in kwargs.items()}
                x = compute(*args, **{**half, "return_dict": False})[0]
                flow.observe(cond, x)
                if flow.should_predict_from_sibling(uncond, cond):
                    return torch.cat([flow.predict_from_sibling(uncond, cond), x])
            x = run()
            below, above = x.chunk(2)
            flow.observe(cond, above)
            flow.observe(uncond, below, cond)
            return x

        def _armed(self, branch: str, before: str | None, compute: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            """The model's own forward, its sites told what to do in it."""
            if not sites or flow.bypass_reason is not None:  # the modules are as disarm left them: exact
                return compute(*args, **kwargs)
            constant = self._same_text(branch, kwargs)
            if laid is not None:
                kwargs = laid.enter(kwargs)
            for site in sites:
                site.arm(branch, before, first=before is None)
                if site.name.startswith("cross."):
                    site.module._tqai_text = site.text.get(branch) if constant else None
                    site.module._tqai_keeps_text = site.module._tqai_mode == OBSERVE
            try:
                return compute(*args, **kwargs)
            finally:
                if laid is not None:
                    laid.leave()
                for site in sites:
                    site.disarm()
                    if site.name.startswith("cross."):
                        self._keep_text(site, branch)

        def _same_text(self, branch: str, kwargs: dict[str, Any]) -> bool:
            """Whether the call has the very text tensors of the last one of its branch."""
            now = [kwargs.get(key) for key in ("encoder_hidden_states", "encoder_hidden_states_image", "attention_kwargs")]
            now += [getattr(x, "_version", 0) for x in now]
            last, self.texts[branch] = self.texts.get(branch), now
            return last is not None and all(a is b or (isinstance(a, int) and a == b) for a, b in zip(last, now, strict=True))

        def _forget_text(self) -> None:
            self.texts: dict[str, Any] = {}
            for site in sites:
                site.text.clear()

        def _keep_text(self, site: Site, branch: str) -> None:
            text, site.module._tqai_text = getattr(site.module, "_tqai_text", None), None
            if text is None or site.text.get(branch) is text:
                return
            site.text[branch] = text
            where = site.where("text", branch)
            flow.memory[where].state["kv"] = text
            flow.recorder.held(flow.model, where, flow.memory.count(where, 0), flow.memory.exact)

        def _clock(self, module: nn.Module) -> Clock:
            """A bare transformer inside a pipeline: the pipeline on the call stack knows its schedule."""
            if not isinstance(clock, CallClock) or clock.steps is not None:
                return clock
            pipe = _caller(module)
            if pipe is None:
                return clock
            if self.found is None or self.found.pipe is not pipe:
                self.found = SchedulerClock(pipe)
            return self.found

        def _look(self, module: nn.Module) -> None:
            """Once a generation: what the user would otherwise not notice."""
            if flow.guidance.on and config.level != "model" and family.name == "sd3":
                handle.recorder.fallback(
                    flow.model, "cfg=difference: SD3 runs both branches as one batch, which level 'model' alone splits"
                )
            if protected and config.level == "model" and not whole:
                handle.recorder.warn(
                    f"skip_layers {sorted(protected)} changes nothing at level 'model', where a step is skipped whole: "
                    "protect steps by a smaller tau, take level 'block' or 'attention', or give all blocks to switch off"
                )
            foreign = [s.name for s in sites if hasattr(s.module, "processor") and not type(s.module.processor).__name__.startswith("Tqai")]
            if foreign:
                handle.recorder.warn(
                    f"{len(foreign)} attention processors are not tqai's ({foreign[0]} ...): something replaced them, as "
                    "fuse_qkv_projections and load_ip_adapter do; call these before tqai, and set_attn_processor after attn_processors"
                )

    return RootHook()


def _caller(module: nn.Module) -> Any:
    """The diffusers pipeline that is calling ``module``, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if hasattr(pipe, "scheduler") and any(getattr(pipe, name, None) is module for name in EXPERTS):
                return pipe
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _agreement(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Sums over the ranks of context parallelism, so that all of them decide alike and none waits in a collective."""

    def agree(sums: Tensor) -> Tensor:
        parallel = getattr(model, "_parallel_config", None)
        if parallel is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return sums
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    return agree
