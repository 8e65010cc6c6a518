"""Spectrum (Han et al., CVPR 2026, arXiv:2603.01623) in a form of ours, written from the paper's idea and from nobody's code.

From the paper: the values of the denoiser are functions of time in Chebyshev polynomials; their coefficients are fitted by ridge
regression to what was computed so far, and forecasts are read from the fit; the schedule is fixed before the run: a warm-up, then
every N-th step with N growing after each computed one; the forecast may be blended with a local one. The schedule's parameters
have the names and the meaning of the ports (``window``, ``flex``, ``warmup``, ``stop``, ``order``, ``ridge``, ``blend``).

Assumed by us: the fitted value is the output of the whole model (the paper forecasts the last block's features, the ports either);
time is the step's index mapped to [-1, 1] over the whole run; one fit a guidance branch, over its last ``keep`` computed outputs (the
paper keeps all); the local forecast of the blend is the line through the last two; the steps from ``stop`` of the run on are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Which steps are computed: ``warmup`` steps, then every ``window``-th where the window grows by ``flex``, and the end."""

    warmup: int = 5
    window: float = 2.0
    flex: float = 0.75
    stop: float = 0.9

    def computed(self, steps: int) -> set[int]:
        found = {step for step in range(steps) if step < self.warmup or step >= self.stop * steps}
        step, window = self.warmup - 1, self.window
        while (step := step + int(window)) < steps:
            found.add(step)
            window += self.flex
        return found


@dataclass(frozen=True)
class Fit:
    """Ridge regression on Chebyshev polynomials up to ``order``; a forecast is a weighted sum of the outputs it was fitted to."""

    order: int = 3
    ridge: float = 0.1
    blend: float = 1.0  # share of the fit; the rest is the line through the last two outputs

    def basis(self, times: Tensor) -> Tensor:
        """``[n, order + 1]`` of ``[n]`` times in [-1, 1]: T_j(x) = cos(j arccos x)."""
        return torch.cos(torch.arange(self.order + 1) * torch.arccos(times.clamp(-1, 1)).unsqueeze(1))

    def weights(self, times: Tensor, now: Tensor) -> Tensor:
        """``[n]``: the share of each output, computed at ``times [n]``, in the forecast at ``now [1]``."""
        known = self.basis(times)
        normal = known.T @ known + self.ridge * torch.eye(self.order + 1, dtype=times.dtype)
        out = self.blend * torch.linalg.solve(normal, known.T).T @ self.basis(now)[0]
        if self.blend < 1:
            ahead = (now[0] - times[-1]) / (times[-1] - times[-2])
            out[-1] += (1 - self.blend) * (1 + ahead)
            out[-2] -= (1 - self.blend) * ahead
        return out


@dataclass
class Spectrum:
    """The model's ``forward`` while the peer is on. ``outputs`` holds (step, output) of the last ``keep`` computed calls a branch."""

    scheduler: Any
    forward: Callable[..., Any]
    schedule: Schedule
    fit: Fit
    keep: int
    outputs: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    step: int = -1
    call: int = 0  # the branch: which call of the step this is
    computed: set[int] = field(default_factory=set)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        steps, step = len(self.scheduler.timesteps), self.scheduler.step_index or 0
        self.call = self.call + 1 if step == self.step else 0
        if step < self.step or self.step < 0:  # a new run
            self.outputs.clear()
            self.computed = self.schedule.computed(steps)
        self.step = step
        held = self.outputs.setdefault(self.call, [])
        if step in self.computed or len(held) < 2:
            out = self.forward(*args, **kwargs)
            held.append((step, out[0]))
            del held[: -self.keep]
            return out
        times = torch.tensor([2 * at / (steps - 1) - 1 for at in (*(at for at, _ in held), step)], dtype=torch.float64)
        shares = self.fit.weights(times[:-1], times[-1:]).tolist()
        forecast = shares[0] * held[0][1]
        for share, (_, output) in zip(shares[1:], held[1:], strict=True):
            forecast.add_(output, alpha=share)
        return (forecast,)
