"""Runs minis and counts: shared by the demo and the benches."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .metrics import nmse, psnr, ssim
from .minis import digits, names
from .report import Report


@dataclass
class Run:
    """One generation. ``calls`` are model calls that really ran."""

    latents: Tensor
    calls: int
    seconds: float
    report: Report | None = None


class Mini:
    """A mini pipeline with a call counter of its own, independent of tqai's report. ``side``: of photographs, 16 or 32 pixels."""

    def __init__(self, kind: str, side: int | None = None) -> None:
        from .hosts.diffusers import minis

        self.family, self.side = names.family(kind), side
        self.kind, self.pipe, self._minis = kind, minis.pipeline(kind), minis
        self.calls = 0
        inner = self.pipe.transformer
        blocks = next(found for name in ("blocks", "transformer_blocks", "layers") if (found := getattr(inner, name, None)) is not None)
        blocks[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def schedule(self, name: str, shift: float, nodes: Sequence[float] | None = None) -> None:
        from .hosts.diffusers.schedulers import scheduler

        self.pipe.scheduler = scheduler(name, shift, self.kind, nodes)

    def run(self, labels: Sequence[int], seed: int, steps: int, config: Config | None = None, guidance: float | None = None) -> Run:
        import tqai_core  # the public door, as users go through it

        inputs = self._minis.inputs(self.kind, labels, guidance, self.side)
        if self.kind == "z_image":  # ZImagePipeline's own sigmas are a list, which UniPC cannot multiply
            inputs["sigmas"] = np.linspace(1, 1 / steps, steps)
        generator = torch.Generator().manual_seed(seed)
        with tqai_core.apply(self.pipe, config) if config is not None else nullcontext() as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.calls, began = 0, time.process_time()
            latents = self.pipe(**inputs, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)[0]
            return Run(latents.float(), self.calls, time.process_time() - began, handle.report() if handle else None)

    def pixels(self, latents: Tensor) -> Tensor:
        return self._minis.pixels(self.kind, latents)

    def labels(self, latents: Tensor) -> Tensor:
        """What the judge reads in them, frame by frame for clips."""
        return digits.read(self.pixels(latents))


def compare(mini: Mini, run: Run, exact: Run) -> dict[str, Any]:
    """Error of a run against the exact run of the same seed and schedule, of the whole batch and of each picture."""
    agree = (mini.labels(run.latents) == mini.labels(exact.latents)).float().mean()
    pixels = mini.pixels(run.latents), mini.pixels(exact.latents)
    return {
        "nmse": nmse(run.latents, exact.latents), "psnr": psnr(run.latents, exact.latents), "ssim": ssim(*pixels),
        "nmse_each": each(nmse, run.latents, exact.latents), "psnr_each": each(psnr, run.latents, exact.latents),
        "ssim_each": each(ssim, *pixels), "agreement": float(agree),
    }  # fmt: skip


def each(metric: Callable[[Tensor, Tensor], float], x: Tensor, exact: Tensor) -> list[float]:
    """``metric`` of every picture of a batch."""
    return [metric(a, b) for a, b in zip(x, exact, strict=True)]


def tails(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with the worst picture and the one at the 5 % quantile (of errors: 95 %) in place of the lists of all pictures:
    ``psnr_each`` becomes ``psnr_tail`` and ``psnr_worst``."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            name, ranked = key.removesuffix("_each"), sorted(value, reverse=not key.startswith(("psnr", "ssim")))
            out |= {f"{name}_tail": ranked[int(0.05 * (len(ranked) - 1))], f"{name}_worst": ranked[0]}
        else:
            out[key] = value
    return out


def machine() -> dict[str, Any]:
    """What a figure's reader must know of the place it was measured."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "diffusers": version("diffusers"),
    }  # fmt: skip


def one_thread() -> None:
    """Two threads on a loaded machine make CPU time meaningless."""
    torch.set_num_threads(1)
