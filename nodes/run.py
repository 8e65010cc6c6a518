"""One sampling of a patched model: made when it starts, dropped when it ends. Knows no host.

Forwards of one evaluation may come from several threads (multi-GPU runs cond and uncond at once), batched or split,
in any order, and the split may change from step to step. Hence a stream is keyed by what is computed, never by its place
in the batch, and everything that belongs to one forward stays in that call.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tqai_core.config import Config
from tqai_core.families.base import Family
from tqai_core.flow import Flow
from tqai_core.inputs import Inputs
from tqai_core.report import Recorder
from tqai_core.roles import EntropyMonitor
from tqai_core.sampler_noise import LEAST, NoiseMeter
from tqai_core.types import Step, Where

from .levels import Forward
from .schedule import Schedule

BRANCHES = ("cond", "uncond")


class Kind(NamedTuple):
    """What is known of a model: its family's name and the names of its blocks, or its class's name and no blocks; the side of its
    patches of latents, 0 if unknown; the levels at which tqai can act."""

    name: str
    blocks: list[str]
    family: Family | None
    patch: int = 0
    levels: tuple[str, ...] = ("model",)


@dataclass(frozen=True)
class Chunk:
    """What one part of a batch computes: guidance index (0 cond, 1 uncond), the condition's id, the context window."""

    index: int
    uuid: Hashable
    window: tuple[int, ...] | None = None


class Run:
    """State of one sampling.

    Args:
        schedule: the sampler's sigmas, or the reason why they are of no use.
        bypass: the reason why everything is computed exactly, if there is one.
        budget: bytes that may be held.
        send: gets :meth:`state` once a step.
        room: gives the free bytes of host memory.
        exact: numbers of the blocks that stay exact.
        inpainting: a part of each latent is that of a given picture.
        parametrisation: of the host's latents and predictions; for the host alone.
    """

    def __init__(
        self,
        config: Config,
        kind: Kind,
        schedule: Schedule | str,
        bypass: str | None = None,
        budget: int | None = None,
        send: Callable[[dict[str, Any]], None] | None = None,
        room: Callable[[], int] | None = None,
        exact: frozenset[int] = frozenset(),
        inpainting: bool = False,
        parametrisation: Any = None,
    ) -> None:
        self.schedule = schedule if isinstance(schedule, Schedule) else None
        self.level, self.kind, self.budget, self.send, self.room, self.exact = config.level, kind, budget, send, room, exact
        self.parametrisation = parametrisation
        self.recorder = Recorder(lambda: self.flow.counted)
        self.flow = Flow(config, self.recorder, kind.name, allow_new_streams=True)
        self.flow.begin(bypass or (schedule if isinstance(schedule, str) else None))
        self.recorder.begin()
        self.evaluations = 0
        self.inside = False
        self._lock = threading.Lock()
        self._names: dict[tuple[int, Hashable], str] = {}
        self._seen: Counter[str] = Counter()
        self._device: torch.device | None = None
        self._inputs = Inputs(batched=False)
        self._noise = NoiseMeter(inpainting)
        self._reached = 0  # attention calls that came through us
        self._warn()

    @contextmanager
    def evaluation(self, sigma: float, x: Tensor | None = None, plus: bool = False) -> Iterator[None]:
        """Around one call of the sampler for a prediction at the latent ``x``: one decision for all forwards within it. ``plus``: the
        sampler is one of CFG++, which steps from the branch without guidance."""
        if self.inside:  # a guider that asks another one: still the same evaluation
            yield
            return
        with self._lock:
            self._seen.clear()
            if x is not None and self.flow.bypass_reason is None:
                self.flow.fresh_noise = self._noise.latent(x)
                if self.flow.fresh_noise > LEAST and plus:
                    self.flow.bypass("a CFG++ sampler that adds noise at every step: forecasts lose to fewer steps there")
            known = self.schedule is not None and (self.flow.bypass_reason is None or not self.evaluations)  # an idle run asks no more
            self.flow.enter(self.schedule.step(self.evaluations, sigma) if known else Step(self.evaluations, sigma))
            self.evaluations += 1
            self.inside = True
        try:
            yield
        finally:
            self.inside = False
        held = 0
        if self.flow.bypass_reason is None:
            with self._lock:
                held = self.flow.nbytes
                self._shrink(held)
        self.recorder.report.decisions[-1]["bytes_held"] = held
        self._send()

    def sampled(self, denoised: Tensor) -> Tensor:
        """The prediction that the sampler gets, all guidance in it."""
        if self.flow.bypass_reason is None and not self.inside:
            self._noise.output(denoised)
        return denoised

    def forward(
        self,
        x: Tensor,
        chunks: Sequence[Chunk],
        compute: Callable[[Forward | None], Tensor],
        velocity: Callable[[Tensor], Tensor],
        restore: Callable[[Tensor], Tensor],
        inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One forward of the model on ``x [chunks * n, ...]``: its own output, or the forecast of every chunk.

        ``compute`` runs the model with what its blocks need to know, ``velocity`` turns its output into what is forecast,
        ``restore`` turns a forecast back. ``inputs`` are the conditions that the model gets besides.
        """
        if not self.inside:
            self._fallback("the model was called outside the sampler's evaluations, so the step is unknown")
            return compute(None)
        if not chunks or x.shape[0] % len(chunks):
            self._fallback("the batch does not split evenly over its conditions")
            return compute(None)
        with self._lock:
            wheres = [self._where(chunk) for chunk in chunks]
            self._device = x.device
            if self.flow.bypass_reason is not None:
                for where in wheres:
                    self.recorder.call(self.kind.name, where, skipped=False)
        if self.flow.bypass_reason is not None:
            return compute(None)
        with self._lock:
            if why := self._inputs.change("+".join(sorted(where.branch for where in wheres)), inputs):
                self.flow.restart(why)
        if self.level != "model":
            return self._run_blocks(x, wheres, compute)
        n = len(wheres)
        signature = (torch.Size((x.shape[0] // n, *x.shape[1:])), x.dtype, x.device)
        with self._lock:
            if not self.flow.decision.compute:
                if all(self.flow.should_skip(where) and self.flow.memory[where].kind == signature for where in wheres):
                    return self._noted(restore(torch.cat([self.flow.forecast(where) for where in wheres])), n)
                self.flow.revise("a branch has no history at this step")
        forward = self._forward(wheres) if isinstance(self.flow.monitor, EntropyMonitor) else None
        out = compute(forward)  # outside the lock: the other device's forward runs meanwhile
        if out.shape != x.shape:
            self._fallback("the model's output has another shape than its input")
            return out
        with self._lock:
            parts = velocity(out).chunk(n)
            corrections = [self.flow.correction(where, part) for where, part in zip(wheres, parts, strict=True)]
            for where, part in zip(wheres, parts, strict=True):
                self.flow.observe(where, part)
        if all(correction is None for correction in corrections):
            return self._noted(out, n)
        corrected = [part if add is None else part + add for part, add in zip(parts, corrections, strict=True)]
        return self._noted(restore(torch.cat(corrected)), n)

    def _noted(self, denoised: Tensor, n: int) -> Tensor:
        """CFG++ samplers make their latents of the single branches' predictions too."""
        for part in denoised.chunk(n):
            self._noise.output(part)
        return denoised

    def _run_blocks(self, x: Tensor, wheres: Sequence[Where], compute: Callable[[Forward | None], Tensor]) -> Tensor:
        """Levels block and attention: the model runs, its blocks ask."""
        if x.ndim in (4, 5) and (patch := self.kind.patch):
            self.flow.memory.grid = (*x.shape[2:-2], -(-x.shape[-2] // patch), -(-x.shape[-1] // patch))
        forward = self._forward(wheres)
        out = compute(forward)
        self._reached += forward.attentions.total()
        if self.level == "attention" and not self._reached:
            self.flow.begin("another node replaced the attention: tqai's was never called")
            self.inside = False
        return out

    def _forward(self, wheres: Sequence[Where]) -> Forward:
        second, numbered = self.kind.family.second_attention if self.kind.family else "", "block" not in self.kind.levels
        branches = [where.branch for where in wheres]
        return Forward(self.flow, self._lock, self.level, second, len(self.kind.blocks), branches, self.exact, numbered)

    def close(self, failed: bool = False) -> dict[str, Any]:
        """The report; nothing stays held. Interrupted and failed runs end here too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the report, and the patch logs them
            self.flow.end()
            if not failed:
                self.recorder.end()
        self._names.clear()
        self._send()
        return self.recorder.report.to_dict()

    def _warn(self) -> None:
        """What the user would otherwise not notice."""
        if self.flow.disabled_reason is None and self.flow.guidance.on:
            self._fallback("cfg=difference: ComfyUI runs cond and uncond in one batch, so both are computed")
        if self.exact and self.level == "model" and len(self.exact) < len(self.kind.blocks):
            self.recorder.note(
                f"skip layers {sorted(self.exact)} change nothing at level model, where a step is skipped whole: protect steps by a "
                "smaller tau, take level block or attention, or give all blocks to switch off"
            )

    def _fallback(self, why: str) -> None:
        self.recorder.fallback(self.kind.name, why)

    @property
    def held(self) -> int:
        return self.flow.nbytes

    def state(self) -> dict[str, Any]:
        """What the live panel shows."""
        report = self.recorder.report
        errors = [d["error"] for d in report.decisions if d["error"] is not None]
        estimates = [d["error_estimate"] for d in report.decisions if d["action"] == "forecast" and d["error_estimate"] is not None]
        return {
            "state": "bypassed" if self.flow.bypass_reason else "active",
            "why": self.flow.bypass_reason or (report.decisions[-1]["why"] if report.decisions else ""),
            "step": report.evaluations,
            "total": len(self.schedule.sigmas) - 1 if self.schedule else None,
            "skipped": sum(d["action"] == "forecast" for d in report.decisions),
            "error": errors[-1] if errors else None,  # of a computed step, had it been forecast
            "estimate": max(estimates, default=None),  # of the steps that were
            "bytes": self.flow.nbytes,
        }

    def _send(self) -> None:
        if self.send is not None:
            self.send(self.state())

    def _where(self, chunk: Chunk) -> Where:
        """Names that mean the same in every run: ids of conditions are drawn anew each time."""
        key = (chunk.index, chunk.uuid)
        if key not in self._names:
            nth = 1 + sum(index == chunk.index for index, _ in self._names)
            base = BRANCHES[chunk.index] if chunk.index < len(BRANCHES) else f"cond{chunk.index}"
            self._names[key] = base if nth == 1 else f"{base}.{nth}"
        name = self._names[key]
        if chunk.window:  # windows may wrap around, so first and last frame are not enough
            name += "@" + "+".join(f"{a}-{b}" for a, b in _ranges(chunk.window))
        self._seen[name] += 1
        # skip-layer guidance and its like run a condition again at the same step: a stream of its own, so that the
        # first one's history stays as it is
        nth = self._seen[name]
        return Where("model", name if nth == 1 else f"{name}#{nth}")

    def _shrink(self, held: int) -> None:
        """Keep the promise of the budget: host memory first, then nothing at all."""
        memory = self.flow.memory
        if self.budget is None or held <= self.budget or self._device is None:
            return
        what = f"{held / 2**20:.1f} MB held, over the budget of {self.budget / 2**20:g} MB"
        free = self.room() if self.room is not None else 0
        if self._device.type != "cpu" and held <= free / 2:
            if memory.offload_device is None:
                memory.offload(torch.device("cpu"))
                self._fallback(f"{what}: kept in CPU memory")
            return
        self._fallback(f"{what}: computed exactly from here on")
        self.flow.begin(f"over the memory budget of {self.budget / 2**20:g} MB")


def _ranges(frames: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 7] -> [(0, 2), (7, 7)]"""
    runs = [[frame for _, frame in run] for _, run in groupby(enumerate(frames), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]
