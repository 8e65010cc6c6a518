"""The calibrated sampler in diffusers: a scheduler, and the pipeline as the calibrator sees it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from ...calibrate.multistep import BatchBarrier, Multistep
from ...calibrate.sampler import CalibratedSampler, Solver, entry_hash, guidance_range
from ...config import Config
from ...errors import TqaiError
from ...modelhash import model_hash
from ...version import VERSION
from .attach import attach, is_attached
from .clock import EXPERTS, pipelines_on_the_stack
from .schedulers import scheduler as stock_scheduler

TRAIN = 1000  # timesteps are sigmas in thousandths, as in every flow-matching scheduler
DIFFERENCE = Config(scorer=None, strategy="delta2:cfg=difference", monitor="fixed:interval=1,min_steps=1", codec="exact")
ONLY_FROM_NOISE = "a calibrated sampler goes the whole way from noise: use strength 1, or another scheduler for img2img"


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A :class:`Multistep` where pipelines expect a scheduler. Its state between steps stays in fp32 whatever the pipeline's
    dtype, as long as the latents are not changed in between."""

    order = 1
    init_noise_sigma = 1.0
    config_name = "scheduler_config.json"
    solver: Multistep  # set by ``of`` and subclasses: an argument of __init__ would be written into the config
    tick: Callable[[], None] = staticmethod(lambda: None)
    called: Callable[[Any, Mapping[str, Any]], None]

    @register_to_config
    def __init__(self, num_train_timesteps: int = TRAIN) -> None:
        self.sigmas = torch.zeros(0)
        self.timesteps = torch.zeros(0)
        self._restart()

    @classmethod
    def of(cls, solver: Multistep, tick: Callable[[], None], called: Callable[[Any, Mapping[str, Any]], None]) -> SolverScheduler:
        made = cls()
        made.solver, made.tick, made.called = solver, tick, called
        return made

    def _restart(self) -> None:
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._given: tuple[Tensor, int, Tensor] | None = None  # the last state in the pipeline's dtype, its version, the same in fp32

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise TqaiError(f"start at step {begin_index} asked (img2img, or a second stage), but {ONLY_FROM_NOISE}")
        self.begin_index = 0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None, **kwargs: Any
    ) -> None:
        """``sigmas`` and ``mu`` that a pipeline proposes are ignored: the grid is the solver's."""
        self._check_request(num_inference_steps, sigmas, mu)
        for pipe, names in pipelines_on_the_stack():
            if pipe.scheduler is self:
                self.called(pipe, names)
                break
        self.num_inference_steps = self.solver.steps
        nodes = torch.tensor(self.solver.nodes, dtype=torch.float64)
        self.sigmas = nodes.float()
        self.timesteps = (nodes[:-1] * self.config.num_train_timesteps).float().to(device)
        self._restart()
        self.solver.begin()

    def _check_request(self, steps: int | None, sigmas: Any, mu: float | None) -> None:
        """TqaiError for a number of steps that the solver does not have."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        raise TqaiError(f"img2img asked, but {ONLY_FROM_NOISE}")

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        i = self.step_index or 0
        if i == 0 and float(timestep) != float(self.timesteps[0]):
            self.set_begin_index(int((self.timesteps.cpu() - float(timestep)).abs().argmin()))
        if i >= self.solver.steps:
            raise TqaiError(f"step {i + 1} of a schedule of {self.solver.steps}: call set_timesteps before another generation")
        if self._given is not None and self._given[0] is sample and self._given[1] == sample._version:
            x = self._given[2]
        else:
            x = sample
        x = self.solver.step(i, model_output, x)
        self.step_index = i + 1
        given = x.to(sample.dtype)
        self._given = given, given._version, x
        self.tick()
        return SchedulerOutput(prev_sample=given) if return_dict else (given,)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


class CalibratedScheduler(SolverScheduler):
    """``pipe.scheduler = tqai.CalibratedScheduler.from_file("flux.sampler.json")`` on SD3, Flux and WAN pipelines.

    Ask for the number of steps it was calibrated for. When a pipeline calls, its transformers, guidance and step count are
    checked: another model, another number, a guidance out of range or a start in the middle is a ValueError.
    ``save_pretrained`` and ``from_pretrained`` keep the whole file in scheduler_config.json.
    """

    @register_to_config
    def __init__(self, sampler: dict[str, Any] | None = None, num_train_timesteps: int = TRAIN) -> None:
        super().__init__(num_train_timesteps)
        if sampler is None:
            raise TqaiError(
                "a CalibratedScheduler comes from a file: CalibratedScheduler.from_file(path), made by tqai calibrate --sampler"
            )
        self.calibrated = CalibratedSampler.from_dict(sampler)
        self.solver = self.calibrated.solver()
        self.called = self._check_caller

    @classmethod
    def from_file(cls, path: str | Path, model: Any = None) -> CalibratedScheduler:
        """``model`` (a pipeline or a transformer), if given, is checked at once and not at the first call."""
        sampler = CalibratedSampler.load(path)
        if model is not None:
            sampler.check({"transformer": model} if isinstance(model, nn.Module) else transformers_of(model))
        return cls(sampler=sampler.to_dict())

    def _check_request(self, steps: int | None, sigmas: Any, mu: float | None) -> None:
        if steps is None and sigmas is None:
            raise TqaiError(f"no number of steps given: this sampler was calibrated for {self.calibrated.steps}")
        self.calibrated.check(steps=len(sigmas) if steps is None else int(steps))
        if mu is not None:
            warnings.warn("mu (the pipeline's shift) is ignored: a calibrated sampler has its own grid", stacklevel=3)

    def _check_caller(self, pipe: Any, names: Mapping[str, Any]) -> None:
        models, g = transformers_of(pipe), self.calibrated.guidance
        name, value = guidance_of(names)
        self.calibrated.check(models, guidance=value if name == g["name"] else None)
        if name != g["name"]:
            raise TqaiError(
                f"{name} is in use, but this sampler was calibrated with {g['name']}={g['made']:g}: use that, or calibrate again"
            )
        if self.calibrated.difference is not None and not all(is_attached(model) for model in models.values()):
            raise TqaiError(
                "this sampler was calibrated with the guidance difference forecast: tqai.apply(pipe, "
                f"tqai.Config.from_json({self.calibrated.difference!r})) first, or calibrate without --difference"
            )


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in EXPERTS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not models:
        raise TqaiError(f"{type(pipe).__name__} has no transformer: the calibrated sampler works on SD3, Flux and WAN pipelines")
    return models


def guidance_of(names: Mapping[str, Any]) -> tuple[str, float]:
    """The guidance argument in use and its value, from the local names of a pipeline's ``__call__``."""
    if names.get("do_true_cfg"):
        return "true_cfg_scale", float(names["true_cfg_scale"])
    value = names.get("guidance_scale")
    return "guidance_scale", 1.0 if value is None else float(value)


class PipelineModel:
    """A diffusers pipeline for the calibrator. ``inputs(seeds)`` gives the pipeline's keyword arguments for a batch, a sample a
    seed; ``batch`` seeds go through the model at a time. The pipeline is as it was afterwards."""

    def __init__(self, pipe: Any, inputs: Callable[[Sequence[int]], dict[str, Any]], batch: int = 8, difference: bool = False) -> None:
        self.pipe, self.inputs, self.batch, self.difference = pipe, inputs, batch, difference
        self.models = transformers_of(pipe)
        if any(is_attached(model) for model in self.models.values()):
            raise TqaiError("tqai is applied to this pipeline: call handle.remove() before calibrating a sampler")
        self.tick: Callable[[float], None] = lambda share: None
        self.more: dict[str, Any] = {}  # arguments over those of inputs
        self.guidance: tuple[str, float]  # this and what follows are known after a run
        self.shape: tuple[int, ...]
        self.spent: float

    def _called(self, pipe: Any, names: Mapping[str, Any]) -> None:
        self.guidance = guidance_of(names)

    def _go(self, pipe: Any, scheduler: Any, seeds: Sequence[int], steps: int, **kwargs: Any) -> Tensor:
        before, pipe.scheduler = pipe.scheduler, scheduler
        options = {**self.inputs(seeds), **self.more, **kwargs, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        try:
            return pipe(**options, num_inference_steps=steps, output_type="latent", return_dict=False)[0]
        finally:
            pipe.scheduler = before

    def _batches(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        return [seeds[i : i + self.batch] for i in range(0, len(seeds), self.batch)]

    def solve(self, seeds: Sequence[int], make: Callable[[int, BatchBarrier], Solver]) -> list[Solver]:
        batches = self._batches(seeds)
        barrier = BatchBarrier(len(batches))
        solvers = [make(k, barrier) for k in range(len(batches))]
        steps = solvers[0].steps
        forecast = self.difference and solvers[0].student
        if forecast and len(batches) > 1:
            raise TqaiError(f"the guidance difference is calibrated on one batch, given {len(batches)}: give batch={len(seeds)}")

        def run(k: int) -> None:
            scheduler = SolverScheduler.of(solvers[k], partial(self.tick, len(batches[k]) / len(seeds)), self._called)
            pipe = self.pipe if len(batches) == 1 else copy.copy(self.pipe)  # components are shared, the scheduler is not
            self.shape = tuple(self._go(pipe, scheduler, batches[k], steps).shape[1:])

        with attach(self.pipe, DIFFERENCE) if forecast else nullcontext() as handle:
            barrier.run([partial(run, k) for k in range(len(batches))])
            report = handle.report() if handle else None
            self.spent = steps * (report.calls - report.calls_skipped) / report.calls if report else steps
        return solvers

    def stock(self, name: str, shift: float, steps: int, seeds: Sequence[int]) -> list[tuple[float, Tensor, Tensor]]:
        return self.run_scheduler(lambda: stock_scheduler(name, shift, "flux" if "Flux" in type(self.pipe).__name__ else ""), steps, seeds)

    def run_scheduler(self, scheduler: Callable[[], Any], steps: int, seeds: Sequence[int]) -> list[tuple[float, Tensor, Tensor]]:
        """(last sigma above 0, state there, final state) of every batch, under any scheduler of diffusers."""
        found = []
        for batch in self._batches(seeds):
            kept: dict[int, Tensor] = {}

            def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor], kept: Any = kept, batch: Any = batch) -> dict[str, Tensor]:
                if i >= steps - 2:
                    kept[i] = tensors["latents"].float().cpu()
                self.tick(len(batch) / len(seeds))
                return {}

            made = scheduler()
            self._go(self.pipe, made, batch, steps, callback_on_step_end=keep)
            found.append((float(made.sigmas[steps - 1]), kept[steps - 2], kept[steps - 1]))
        return found

    @contextmanager
    def guided(self, guidance: float) -> Iterator[None]:
        self.more, kept = {self.guidance[0]: guidance}, self.guidance
        try:
            yield
        finally:
            self.more, self.guidance = {}, kept

    def header(self) -> dict[str, Any]:
        first = next(iter(self.models.values()))
        return {
            "models": {key: model_hash(model) for key, model in self.models.items()}, "model_class": type(first).__name__,
            "entry": entry_hash(first), "shape": self.shape, "guidance": guidance_range(*self.guidance),
            "versions": {"tqai": VERSION, "torch": str(torch.__version__), "diffusers": diffusers.__version__},
            "difference": DIFFERENCE.to_json() if self.difference else None,
        }  # fmt: skip
