"""``tqai calibrate --sampler``: arguments, prompts and the table that is printed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import TqaiError
from ..progress import progress_bar
from ..text import comma_list, lines_in

PROMPTS = (
    "a portrait of an old fisherman, studio light",
    "a city street at night in the rain, neon signs",
    "a bowl of fruit on a wooden table, oil painting",
    "a mountain lake at sunrise with mist",
    "a red sports car driving along the coast",
    "a cat sleeping on a windowsill, watercolour",
    "an astronaut riding a horse",
    "a page with the words HELLO WORLD in large letters",
)
FIRST, FIRST_HELD_OUT = 7700, 8800


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``--sampler`` adds to ``tqai calibrate``, which has -m, -o and --demo itself."""
    group = parser.add_argument_group("with --sampler")
    group.add_argument("--sampler", action="store_true", help="fit a sampler of few steps to a fine run of the model")
    group.add_argument("--steps", type=int, help="steps of the sampler (default 12); without --sampler of a run (default 24)")
    group.add_argument("--form", choices=("all", "last"), default="all", help="fit every step, or only the step to 0 on your own grid")
    group.add_argument("--shift", type=float, help="your own grid's shift; always the grid of --form last")
    group.add_argument("--difference", action="store_true", help="with guidance: forecast cond - uncond on half of the steps")
    group.add_argument("--teacher", type=int, default=100, help="model calls of the fine reference run that the sampler is fitted to")
    group.add_argument("--samples", type=int, default=4, help="seeds to fit on")
    group.add_argument("--held-out", type=int, default=3, help="other seeds, on which it must beat the stock solvers")
    group.add_argument("--batch", type=int, help="seeds in one call of the model; default: 1, and all for a demo")
    group.add_argument("--guidance", type=float, help="guidance to calibrate at; default: the pipeline's own, and 2 for a demo")
    reach = "other guidance values to try it at; each is allowed if it wins there"
    group.add_argument("--reach", type=comma_list(float), default=(), metavar="W,...", help=reach)
    group.add_argument("--prompts", type=Path, metavar="TEXTFILE", help="one prompt a line; default: eight built-in prompts")
    group.add_argument("--size", help="WIDTHxHEIGHT, and xFRAMES for video; default: the pipeline's own")
    group.add_argument("--device", default="cpu", help="device of the model, as in cuda")
    group.add_argument("--dtype", default="bfloat16", help="dtype of the weights of -m")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the file and return its content with what it cost."""
    from ..hosts.diffusers.sampler import PipelineModel
    from .sampler import calibrate, extend_guidance_range

    args.steps = 12 if args.steps is None else args.steps
    if args.samples < 1 or args.held_out < 1:
        raise TqaiError(f"--samples {args.samples} --held-out {args.held_out}: give 1 or more")
    pipe, inputs = _demo(args) if args.demo else _pipeline(args)
    model = PipelineModel(pipe, inputs, batch=args.batch or (args.samples if args.demo else 1), difference=args.difference)
    began = time.process_time()
    with progress_bar("calibrating") as progress:
        sampler = calibrate(
            model, args.steps, seeds=range(FIRST, FIRST + args.samples), held_out=range(FIRST_HELD_OUT, FIRST_HELD_OUT + args.held_out),
            form=args.form, shift=args.shift, reference_calls=args.teacher, progress=progress,
        )  # fmt: skip
        for guidance in args.reach:
            sampler = extend_guidance_range(model, sampler, guidance, progress=progress)
    sampler.save(args.output)
    return {**sampler.to_dict(), "file": str(args.output), "seconds_cpu": time.process_time() - began}


def tables_of(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    held, e4 = result["held_out"], lambda v: f"{v * 1e4:.2f}"
    stock = held["stock"]
    rows = [
        ["calibrated", f"{result['calls']:g}", result["grid"], e4(held["error"]), e4(held["before_last"])],
        [stock["name"], str(len(result["nodes"])), f"shift {stock['shift']:g}", e4(stock["error"]), e4(stock["before_last"])],
    ]
    head = ["sampler", "calls", "grid", "NMSE e-4 on unseen seeds", "before the last step"]
    return [(f"{result['file']}: {len(result['nodes'])} steps, {result['seconds_cpu']:.0f} CPU s", head, rows)]


def _demo(args: argparse.Namespace) -> tuple[Any, Callable[[Sequence[int]], dict[str, Any]]]:
    """A mini; its labels are 0 to 4 alone, so that 5 to 9 stay unseen."""
    from ..hosts.diffusers import minis

    guidance = 2.0 if args.guidance is None else args.guidance
    return minis.pipeline(args.demo), lambda seeds: minis.inputs(args.demo, [seed % 5 for seed in seeds], guidance)


def _pipeline(args: argparse.Namespace) -> tuple[Any, Callable[[Sequence[int]], dict[str, Any]]]:
    from ..hosts.diffusers.load import pipeline

    prompts: Sequence[str] = PROMPTS
    if args.prompts is not None:
        prompts = lines_in(args.prompts.read_text())
        if not prompts:
            raise TqaiError(f"{args.prompts} has no prompts: write one a line")
    fixed: dict[str, Any] = {}
    if args.size is not None:
        try:
            fixed = dict(zip(("width", "height", "num_frames"), map(int, args.size.lower().split("x")), strict=False))
        except ValueError:
            raise TqaiError(f"--size {args.size}: give WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, as in 1024x1024") from None
    if not isinstance(dtype := getattr(torch, args.dtype, None), torch.dtype):
        raise TqaiError(f"dtype {args.dtype!r} is unknown: give bfloat16, float16 or float32")
    pipe = pipeline(args.model, dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(args.device)
    if args.guidance is not None:
        fixed["guidance_scale"] = args.guidance
    return pipe, lambda seeds: {"prompt": [prompts[seed % len(prompts)] for seed in seeds], **fixed}
