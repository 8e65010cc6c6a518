"""Solvers that plug into diffusers pipelines: the baselines tqai is measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ...calibrate.multistep import grid
from ...errors import TqaiError

SCHEDULERS = ("euler", "uniform", "unipc", "dpm++", "ab2")


class UniformEuler(FlowMatchEulerDiscreteScheduler):
    """Euler at 1, 1 - 1/n, ..., 1/n, on which few-step students were trained, where a pipeline does not say its sigmas (WAN's does not)."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kw: Any) -> None:  # type: ignore[override]
        n = num_inference_steps or len(sigmas)
        super().set_timesteps(sigmas=[1 - i / n for i in range(n)], device=device)


class AdamsBashforth2(FlowMatchEulerDiscreteScheduler):
    """Second-order Adams-Bashforth on any nodes: the same line through two velocities that ``delta2`` draws.

    ``nodes`` are the sigmas to evaluate at, without the final 0; the shifted uniform grid without them. What a pipeline
    proposes as sigmas is ignored.
    """

    nodes: Sequence[float] | None = None

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kw: Any) -> None:  # type: ignore[override]
        nodes = grid(num_inference_steps or len(sigmas), self.config.shift) if self.nodes is None else (*self.nodes, 0.0)
        values = torch.tensor(nodes, dtype=torch.float64)
        self.sigmas = values.float()
        self.timesteps = (values[:-1] * self.config.num_train_timesteps).float().to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._before: tuple[float, Tensor] | None = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **kw: Any) -> Any:  # type: ignore[override]
        i = self._step_index or 0
        now, then = float(self.sigmas[i]), float(self.sigmas[i + 1])
        v, h = model_output.float(), then - now
        if self._before is not None:
            slope = (v - self._before[1]) / (now - self._before[0])
            v = v + h / 2 * slope
        self._before = (now, model_output.float())
        self._step_index = i + 1
        return ((sample.float() + h * v).to(sample.dtype),)


def scheduler(name: str, shift: float = 1.0, pipeline: str = "", nodes: Sequence[float] | None = None) -> Any:
    """A flow-matching scheduler by name at a given shift. ``pipeline="flux"`` makes UniPC and DPM++ take the shift the
    way FluxPipeline hands it over (a ``mu`` computed from the image size)."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "uniform":
        return UniformEuler(shift=shift)
    if name == "ab2":
        ab2 = AdamsBashforth2(shift=shift)
        ab2.nodes = nodes
        return ab2
    if name not in SCHEDULERS:
        raise TqaiError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}")
    cls = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    kw: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if pipeline != "flux":
        return cls(**kw)
    solver = cls(**kw, use_dynamic_shifting=True, time_shift_type="exponential")
    solver.register_to_config(base_shift=math.log(shift), max_shift=math.log(shift))
    return solver
