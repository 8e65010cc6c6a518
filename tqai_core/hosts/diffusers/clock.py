"""Where the sampler is, told by the pipeline's scheduler or by the calls alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from ...families.base import Family
from ...types import Step

EXPERTS = ("transformer", "transformer_2")  # one takes over from the other on the way
# attributes of a pipeline that hold what its scheduler integrates
DENOISERS = (*EXPERTS, "transformer_ref", "unconditional_transformer", "unet")


def denoisers(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline by their names in it."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: model for name, model in found.items() if model is not None}


@dataclass(frozen=True)
class Tick:
    """One call of the transformer. ``key`` is the same for all calls of one evaluation."""

    key: Any
    step: Step
    fresh: bool  # first evaluation of a new generation
    bypass: str | None = None  # why the generation is computed exactly
    audio_sigma: float | None = None  # where the second output has a schedule of its own


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds noise of its own at each step, by its options and its name."""
    config, name = scheduler.config, type(scheduler).__name__
    return (
        bool(config.get("stochastic_sampling"))
        or str(config.get("algorithm_type", "")).startswith("sde")
        or any(word in name for word in ("Ancestral", "SDE", "LCM", "TCD"))
    )


class SchedulerClock:
    """Reads the pipeline's scheduler: no host sync, right for bf16 timesteps, UniPC, DPM++ and cut schedules."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.start = 0
        self.reset()

    def reset(self) -> None:
        self.timesteps: Any = None
        self.bypass: str | None = None
        self.calls = -1
        self.seen: float | None = None  # the last timestep, in runs that are computed exactly

    def tick(self, timestep: Any, family: Family, context: Any) -> Tick | None:
        """None for a call outside of the denoising loop, such as one that fills a cache."""
        scheduler = self.pipe.scheduler
        if scheduler is None or getattr(scheduler, "timesteps", None) is None:
            return None
        fresh = scheduler.timesteps is not self.timesteps  # every generation calls set_timesteps
        if fresh:
            self.timesteps = scheduler.timesteps
            self.sigmas = _noise_levels(scheduler)
            self.audio_sigmas = _noise_levels(getattr(self.pipe, "audio_scheduler", None))
            if len(self.audio_sigmas) != len(self.sigmas):
                self.audio_sigmas = []
            self.bypass = self._unusable()
            self.calls, self.seen = -1, None
            self.start = 0 if self.bypass else self._position(timestep, family, first=True)
        if self.bypass:
            return self._counted(timestep, fresh)
        at = self._position(timestep, family)
        if at >= len(self.timesteps):  # after the last step
            return None
        sigma = self.sigmas[at] if at < len(self.sigmas) else 0.0
        after = self.sigmas[at + 1] if not adds_noise(scheduler) and at + 1 < len(self.sigmas) else None
        last = at == len(self.timesteps) - 1
        step = Step(at, sigma, len(self.timesteps) - self.start, last, self._width(at), after)
        return Tick(at, step, fresh, audio_sigma=self.audio_sigmas[at] if at < len(self.audio_sigmas) else None)

    def _unusable(self) -> str | None:
        """Why runs with this scheduler are computed exactly, or None."""
        scheduler, name = self.pipe.scheduler, type(self.pipe.scheduler).__name__
        if len(self.sigmas) < len(self.timesteps) or not hasattr(scheduler, "step_index"):
            return f"{name} tells no sigma of a step: use a flow-matching scheduler"
        if max(self.sigmas) > 1 + 1e-3:
            return f"{name} has sigmas up to {max(self.sigmas):.3g}, which is no flow-matching schedule (0 to 1): use one of these"
        if getattr(scheduler, "order", 1) != 1:
            return f"{name} evaluates a step {scheduler.order} times: skipping is proven for one evaluation a step"
        return None

    def _counted(self, timestep: Any, fresh: bool) -> Tick:
        """The evaluation by a new value of ``timestep``, for a run that is computed exactly."""
        now = None if timestep is None else float(torch.as_tensor(timestep).flatten()[-1])
        self.calls += now is None or now != self.seen
        self.seen = now
        total = len(self.timesteps)
        return Tick(self.calls, Step(self.calls, 0.0, total, self.calls == total - 1), fresh, self.bypass)

    def _width(self, at: int) -> float:
        """The step from here relative to the mean step of the schedule."""
        if at + 1 >= len(self.sigmas) or self.sigmas[self.start] == self.sigmas[-1]:
            return 1.0
        mean = abs(self.sigmas[self.start] - self.sigmas[-1]) / (len(self.sigmas) - 1 - self.start)
        return abs(self.sigmas[at] - self.sigmas[at + 1]) / mean

    def _position(self, timestep: Any, family: Family, first: bool = False) -> int:
        scheduler = self.pipe.scheduler
        if scheduler.step_index is not None and not first:
            return int(scheduler.step_index)
        if getattr(scheduler, "begin_index", None) is not None:
            return int(scheduler.begin_index)
        if not first:
            return self.start
        now = _time_of_the_loop() if family.by_scheduler else family.sigma(timestep) * 1000.0  # schedulers count in thousandths
        times = torch.as_tensor(self.timesteps).float().cpu()
        return 0 if now is None else int((times - now).abs().argmin())


class CallClock:
    """A loop of the user's own: a new timestep is a new evaluation, a larger one a new generation."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.index = -1
        self.reset()

    def reset(self) -> None:
        self.sigma: float | None = None

    def tick(self, timestep: Any, family: Family, context: Any) -> Tick:
        unknown = family.by_scheduler or timestep is None
        sigma = 0.0 if unknown else family.sigma(timestep)
        position, total = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None) or self.steps
        fresh = self.sigma is None or sigma > self.sigma + 1e-6 or (total is not None and self.index + 1 >= total and sigma != self.sigma)
        if fresh:
            self.index = 0
        elif sigma != self.sigma:
            self.index += 1
        self.sigma = sigma
        at = self.index if position is None else position
        bypass = None if total else "the last step is unknown: give apply(transformer, config, steps=N)"
        if unknown:
            bypass = f"sigma is unknown, since no running pipeline has this {family.name}: apply tqai to the pipeline"
        return Tick(at, Step(at, sigma, total, total is not None and at == total - 1), fresh, bypass)


class NoClock:
    """A pipeline whose loop has no scheduler, such as one that noises its picture anew after each step: nothing can be forecast."""

    def __init__(self, pipe: Any) -> None:
        self.bypass = f"{type(pipe).__name__} has no scheduler, so sigma and step are unknown"
        self.reset()

    def reset(self) -> None:
        self.calls = -1

    def tick(self, timestep: Any, family: Family, context: Any) -> Tick:
        self.calls += 1
        return Tick(self.calls, Step(self.calls, 0.0, None, False), self.calls == 0, self.bypass)


def _noise_levels(scheduler: Any) -> list[float]:
    """Sigma of each step and of the end, falling; [] where the scheduler has none."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return []
    numbers: list[float] = torch.as_tensor(sigmas).float().cpu().tolist()
    return [1 - x for x in numbers] if getattr(scheduler, "config", {}).get("invert_sigmas") else numbers  # else it is the share of data


def _time_of_the_loop() -> float | None:
    """The time ``t`` of the loop that calls the model, for schedules that a pipeline cut without telling its scheduler.

    The loops of diffusers name it so, in plain and in modular pipelines; the attribute ``_current_timestep`` is missing in
    modular pipelines, and one of the plain ones puts 1000 - t there.
    """
    times = (names.get("t") for names in _calls_on_the_stack())
    return next((float(t) for t in times if isinstance(t, float | int) or (isinstance(t, torch.Tensor) and t.numel() == 1)), None)


Clock = SchedulerClock | CallClock | NoClock  # ``tick`` at each call of the transformer, ``reset`` when a generation is over


def pipelines_on_the_stack() -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Pipelines whose ``__call__`` is running, the innermost first, each with the local names of that call.

    A bare transformer that was patched by itself has no other way to its schedule. Tried instead, on the diffusers of constraints.txt:

    - the cache context: of all pipelines here, one of WAN's alone puts the step into it; Flux gives a name, SD3 sets no context;
    - a hook or a ContextVar set by the pipeline: it may be made after the patch, and each class has a ``__call__`` of its own, so
      that all classes would have to be patched;
    - patching ``set_timesteps`` of the schedulers: a scheduler does not know which transformer its steps are for.
    """
    for names in _calls_on_the_stack():
        if hasattr(pipe := names.get("self"), "scheduler"):
            yield pipe, names


def _calls_on_the_stack() -> Iterator[Mapping[str, Any]]:
    """The local names of every ``__call__`` that is running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            yield frame.f_locals
        frame = frame.f_back
