"""diffusers: one root hook a transformer that knows step, sigma, branch and expert, and asks the flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..flow import Flow
from ..handle import Handle
from ..types import Step, Where
from . import flux, sd3, wan
from .families import Family

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
    raise ValueError(f"{type(transformer).__name__} is no transformer tqai knows; known: {known}")


def attach(target: Any, config: Config, steps: int | None = None) -> Handle:
    """Hook every transformer of a pipeline, or a bare one. Nothing is changed when this raises."""
    pipe = target if hasattr(target, "scheduler") and not isinstance(target, nn.Module) else None
    if pipe is None and not isinstance(target, nn.Module):
        raise ValueError(f"{type(target).__name__} is neither a diffusers pipeline nor a transformer: give one of these")
    found = {name: getattr(pipe, name, None) for name in EXPERTS} if pipe is not None else {"transformer": target}
    models = {name: model for name, model in found.items() if model is not None}
    if not models:
        raise ValueError(f"{type(target).__name__} has no transformer: tqai works on SD3, Flux and WAN pipelines")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: give the number of denoiser evaluations of your loop, 1 or more")
    families = {name: family_of(model) for name, model in models.items()}
    for name, model in models.items():
        _check(name, model, families[name], config)
    handle = Handle()
    clock: Clock = SchedulerClock(pipe) if pipe is not None else CallClock(next(iter(families.values())), steps)
    for name, model in models.items():
        _hook(name, model, families[name], config, handle, clock)
    return handle


def _check(name: str, model: Any, family: Family, config: Config) -> None:
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK) is not None:
        raise ValueError(f"tqai is already applied to this {name}: call handle.remove() first")
    depth = len(family.layers(model))
    if wrong := [layer for layer in config.skip_layers if not -depth <= layer < depth]:
        raise ValueError(
            f"skip_layers {wrong} asked, but {type(model).__name__} has {depth} blocks: use 0 to {depth - 1} or -{depth} to -1"
        )


def _hook(name: str, model: Any, family: Family, config: Config, handle: Handle, clock: Clock) -> None:
    from diffusers.hooks.hooks import HookRegistry

    had_forward, had_registry = "forward" in vars(model), "_diffusers_hook" in vars(model)
    depth = len(family.layers(model))
    protected = {layer % depth for layer in config.skip_layers}
    flow = Flow(config, handle.recorder, name, _agreement(model))
    handle.flows.append(flow)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(_root_hook(flow, family, handle, clock, protected, depth), HOOK)
    registry.invalidate_child_registries_cache()
    lacks_reset = not hasattr(model, "_reset_stateful_cache")  # SD3 has no CacheMixin; pipelines call this after a run
    if lacks_reset:
        model._reset_stateful_cache = lambda: registry.reset_stateful_hooks()

    def undo() -> None:
        registry.remove_hook(HOOK, recurse=False)
        registry.invalidate_child_registries_cache()
        if lacks_reset:
            vars(model).pop("_reset_stateful_cache", None)
        if not registry.hooks:
            if not had_forward:
                vars(model).pop("forward", None)
            if not had_registry:
                vars(model).pop("_diffusers_hook", None)

    handle.on_remove(undo)


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
        return Tick(at, Step(at, sigma, total, at == len(self.timesteps) - 1, self._width(at)), fresh, bypass)

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

    def __init__(self, family: Family, steps: int | None) -> None:
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


def _root_hook(flow: Flow, family: Family, handle: Handle, clock: Clock, protected: set[int], depth: int) -> Any:
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
            self.restart()

        def restart(self) -> None:
            self.key: Any = None
            self.branches: Counter[str] = Counter()
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
            if isinstance(clock, CallClock):
                clock.forget()
            if isinstance(clock, SchedulerClock):
                clock.timesteps = None

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            compute: Callable[..., Any] = self.fn_ref.original_forward
            try:
                return self._through(compute, args, kwargs)
            except BaseException:  # also KeyboardInterrupt: a broken run leaves nothing behind
                self._finish()
                raise

        def _through(self, compute: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            if "timestep" not in kwargs:
                handle.recorder.fallback(flow.model, "timestep was not given by keyword, so the step is unknown")
                return compute(*args, **kwargs)
            context = self.context._context
            tick = clock.tick(kwargs["timestep"], family, context)
            if tick.fresh:
                handle.recorder.end()
                handle.recorder.begin()
                if protected:
                    self._protect()
            if self.key is None or tick.fresh or tick.key != self.key:
                if self.key is None or tick.fresh:
                    for other in handle.flows:  # the other expert's memory is of no more use
                        other.begin()
                    flow.begin(tick.bypass or (f"all {depth} blocks are in skip_layers" if len(protected) == depth else None))
                self.key, self.branches = tick.key, Counter()
                flow.enter(tick.step)
            name = getattr(context, "name", None) or "call"
            self.branches[name] += 1
            nth = self.branches[name]
            branch = name if nth == 1 and context is not None else f"{name}{nth - 1}"
            kept: list[Any] = []

            def run() -> Tensor:
                out = compute(*args, **kwargs)
                kept.append(out)
                return out[0]

            x = flow.through(Where("model", branch), run)
            if kept:
                self.output = type(kept[0])
                return kept[0]
            if not kwargs.get("return_dict", True) or self.output is None or issubclass(self.output, tuple):
                return (x,)
            return self.output(sample=x)

        def _protect(self) -> None:
            if len(protected) < depth:
                handle.recorder.warn(
                    f"skip_layers {sorted(protected)} changes nothing at level 'model', where a step is skipped whole: "
                    "protect steps by a smaller tau, or all blocks to switch off"
                )

    return RootHook()


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
