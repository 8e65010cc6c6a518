"""``tqai run`` on a folder of a diffusers pipeline."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from dataclasses import asdict
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


def _balanced(pipe: Any) -> Config:
    family = find(next(iter(denoisers(pipe).values())), "diffusers")
    return preset("balanced", family.name if family else None)


def run(args: argparse.Namespace, config: Config | None, device: torch.device) -> dict[str, Any]:
    video = _format(args.video)
    pipe = load(args, device)
    config = config or _balanced(pipe)
    known = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {"prompt": args.prompt}
    for name, key in ARGUMENTS.items():
        if (given := getattr(args, name)) is not None:
            if key not in known:
                raise TqaiError(f"--{name}: {type(pipe).__name__} takes no {key}: leave it out")
            options[key] = given
    last: dict[str, Tensor] = {}
    if "callback_on_step_end" in known:
        options["callback_on_step_end"] = lambda pipe, i, t, kw: last.update(kw) or {}

    def generate(**over: Any) -> tuple[np.ndarray, Tensor | None, dict[str, Any]]:
        last.clear()
        generator = torch.Generator().manual_seed(args.seed)
        with Peak(device) as peak:
            began = time.perf_counter()
            try:
                out = pipe(**{**options, **over}, generator=generator, output_type="np")
            except (ValueError, TypeError, AttributeError) as error:
                raise TqaiError(f"{type(pipe).__name__} refuses: {first_line(error)}; change the option that it names") from error
            seconds = time.perf_counter() - began
        pixels = out.frames if hasattr(out, "frames") else out.images
        return np.asarray(pixels), last.get("latents"), {"seconds": seconds, "peak": {"bytes": peak.nbytes, "how": peak.how}}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # ours are in the report, which is printed
        if args.compare:
            short = {"num_inference_steps": 2} if "num_inference_steps" in known else {}
            generate(**short)
            with tqai_core.apply(pipe, config):
                generate(**short)
        with tqai_core.apply(pipe, config) as handle:
            pixels, latents, figures = generate()
            report = handle.report()
        result = {
            "kind": "pipeline", "model": args.model, "pipeline": type(pipe).__name__, "prompt": args.prompt, "seed": args.seed,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."), "device": str(device), "config": config.to_dict(), **figures,
            "files": save(pixels, args.out, f"tqai-{args.seed}", video), "report": report.to_dict(), "warnings": list(report.warnings),
        }  # fmt: skip
        if args.compare:
            exact, exact_latents, figures = generate()
            ours, theirs = (torch.as_tensor(p).movedim(-1, 1) for p in (pixels, exact))
            against = Comparison.of([("picture", ours, theirs)])
            result["compare"] = {
                **figures, "files": save(exact, args.out, f"exact-{args.seed}", video), "identical": bool((pixels == exact).all()),
                **asdict(against.rows["picture"]), "page": str(args.out / f"compare-{args.seed}.html"),
                "psnr_latents": None if latents is None or exact_latents is None else psnr(latents, exact_latents),
            }  # fmt: skip
            grey = save(against.difference[None, :, :, None].repeat(1, 1, 1, 3).numpy(), args.out, f"difference-{args.seed}", video)
            Path(result["compare"]["page"]).write_text(page(result, against, grey, report), encoding="utf-8")
    return result


def _format(asked: str | None) -> str:
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
