"""``tqai run`` on a folder of a diffusers pipeline."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import export_to_video, logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

import tqai_core

from ...closeness import Comparison
from ...config import Config, preset
from ...errors import TqaiError
from ...families import find
from ...metrics import psnr
from ...peak import Peak
from ...report import Report
from ...run_page import page
from ...text import first_line
from .clock import denoisers
from .load import pipeline

ARGUMENTS = {
    "steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt", "height": "height", "width": "width",
    "frames": "num_frames",
}  # fmt: skip
FPS = 16


def load(args: argparse.Namespace, device: torch.device) -> Any:
    """The pipeline, in fp32 on a CPU and bf16 elsewhere unless ``--dtype`` says otherwise; ValueError in one line."""
    dtype = (torch.float32 if device.type == "cpu" else torch.bfloat16) if args.dtype == "auto" else getattr(torch, args.dtype)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        pipe = pipeline(args.model, dtype)
    finally:
        logging.set_verbosity(verbosity)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


@dataclass(frozen=True)
class Outcome:
    """``pixels`` 0 to 1, ``[n, (frames,) h, w, c]``; ``latents`` where the pipeline shows them; ``figures``: seconds and the peak."""

    pixels: np.ndarray
    latents: Tensor | None
    figures: dict[str, Any]
    report: Report | None = None

    def against(self, exact: Outcome) -> Comparison:
        ours, theirs = (torch.as_tensor(outcome.pixels).movedim(-1, 1) for outcome in (self, exact))
        pairs = [("picture", ours, theirs)]
        if self.latents is not None and exact.latents is not None and self.latents.ndim > 3:
            pairs.insert(0, ("latents", self.latents, exact.latents))
        return Comparison.of(pairs)

    def tenfold(self, exact: Outcome) -> np.ndarray:
        """Pixels of the difference to the exact run, times ten: a tenth of the range is white."""
        return 10 * np.abs(self.pixels - exact.pixels)


@dataclass(frozen=True)
class Runner:
    """One call of a pipeline, with or without tqai, as often as it is asked for. ``inputs``: its keyword arguments."""

    pipe: Any
    inputs: dict[str, Any]
    seed: int
    device: torch.device

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device) -> Runner:
        pipe = load(args, device)
        known = inspect.signature(type(pipe).__call__).parameters
        inputs: dict[str, Any] = {"prompt": args.prompt}
        for name, key in ARGUMENTS.items():
            if (given := getattr(args, name)) is not None:
                if key not in known:
                    raise TqaiError(f"--{name}: {type(pipe).__name__} takes no {key}: leave it out")
                inputs[key] = given
        return cls(pipe, inputs, args.seed, device)

    @property
    def known(self) -> Any:
        """The arguments that the pipeline takes."""
        return inspect.signature(type(self.pipe).__call__).parameters

    @property
    def name(self) -> str:
        return type(self.pipe).__name__

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(denoisers(self.pipe).values())).dtype

    @property
    def family(self) -> str | None:
        found = find(next(iter(denoisers(self.pipe).values())), "diffusers")
        return found.name if found else None

    def warm(self, config: Config | None) -> None:
        """Two steps: caches and kernels that a first run makes are part of no figure."""
        self.go(config, **({"num_inference_steps": 2} if "num_inference_steps" in self.known else {}))

    def go(self, config: Config | None, **over: Any) -> Outcome:
        """``config`` None: the exact run."""
        with warnings.catch_warnings(), tqai_core.apply(self.pipe, config) if config else nullcontext() as handle:
            warnings.filterwarnings("ignore", category=UserWarning)  # ours are in the report
            out = self._call({**self.inputs, **over})
            return replace(out, report=handle.report()) if handle else out

    def _call(self, inputs: dict[str, Any]) -> Outcome:
        last: dict[str, Tensor] = {}
        if "callback_on_step_end" in self.known:
            inputs["callback_on_step_end"] = lambda pipe, i, t, kw: last.update(kw) or {}
        with Peak(self.device) as peak:
            began = time.perf_counter()
            try:
                out = self.pipe(**inputs, generator=torch.Generator().manual_seed(self.seed), output_type="np")
            except (ValueError, TypeError, AttributeError) as error:
                raise TqaiError(f"{self.name} refuses: {first_line(error)}; change the option that it names") from error
            seconds = time.perf_counter() - began
        pixels = np.asarray(out.frames if hasattr(out, "frames") else out.images)
        return Outcome(pixels, last.get("latents"), {"seconds": seconds, "peak": {"bytes": peak.nbytes, "how": peak.how}})


def run(args: argparse.Namespace, config: Config | None, device: torch.device) -> dict[str, Any]:
    video = form(args.video)
    runner = Runner.of(args, device)
    config = config or preset("balanced", runner.family)
    if args.compare:
        runner.warm(None)
        runner.warm(config)
    ours = runner.go(config)
    report = ours.report
    assert report is not None
    result = {
        "kind": "pipeline", "model": args.model, "pipeline": runner.name, "prompt": args.prompt, "seed": args.seed,
        "dtype": str(runner.dtype).removeprefix("torch."), "device": str(device), "config": config.to_dict(),
        **ours.figures, "files": save(ours.pixels, args.out, f"tqai-{args.seed}", video), "report": report.to_dict(),
        "warnings": list(report.warnings),
    }  # fmt: skip
    if args.compare:
        exact = runner.go(None)
        close = ours.against(exact)
        result["compare"] = {
            **exact.figures, "files": save(exact.pixels, args.out, f"exact-{args.seed}", video), **asdict(close.rows["picture"]),
            "identical": bool((ours.pixels == exact.pixels).all()), "page": str(args.out / f"compare-{args.seed}.html"),
            "psnr_latents": None if ours.latents is None or exact.latents is None else psnr(ours.latents, exact.latents),
        }  # fmt: skip
        tenfold = save(ours.tenfold(exact), args.out, f"difference-{args.seed}", video)
        Path(result["compare"]["page"]).write_text(page(result, close, tenfold, report), encoding="utf-8")
    return result


def form(asked: str | None) -> str:
    """mp4 needs imageio with ffmpeg or PyAV behind it."""
    can = find_spec("imageio") is not None and any(find_spec(name) is not None for name in ("imageio_ffmpeg", "av"))
    if asked == "mp4" and not can:
        raise TqaiError("--video mp4 needs imageio and ffmpeg: pip install imageio imageio-ffmpeg, or take gif or webp")
    return asked if asked not in (None, "auto") else "mp4" if can else "gif"


def save(pixels: np.ndarray, folder: Path, name: str, video: str) -> list[str]:
    """Pictures ``[n, h, w, c]`` as PNG or clips ``[n, frames, h, w, c]`` as ``video``, numbers 0 to 1; the files' paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    made, clip = [], pixels.ndim == 5
    for i, item in enumerate((np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8)):
        path = f"{folder / (name if len(pixels) == 1 else f'{name}-{i}')}.{video if clip else 'png'}"
        frames = [Image.fromarray(frame) for frame in (item if clip else item[None])]
        if not clip:
            frames[0].save(path)
        elif video == "mp4":
            export_to_video(frames, path, fps=FPS)
        else:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)
        made.append(path)
    return made
