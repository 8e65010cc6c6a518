"""``tqai calibrate --sampler``: arguments, prompts and the table that is printed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..arguments import comma_list, lines_in, number, refuse_ignored, size, whole
from ..errors import TqaiError
from ..progress import progress_bar

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
DTYPES = ("bfloat16", "float16", "float32")
# options that calibrate takes with --sampler only, and without it only
SAMPLER_ONLY = ("form", "shift", "difference", "teacher", "samples", "held_out", "guidance", "reach", "size", "device", "dtype")
PLAIN_ONLY = ("text", "part", "seeds", "bands", "probes", "bits", "average", "codec")


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``--sampler`` adds to ``tqai calibrate``, which has -m, -o and --demo itself."""
    group = parser.add_argument_group("with --sampler")
    group.add_argument("--sampler", action="store_true", help="fit a sampler of few steps to a fine run of the model")
    group.add_argument("--steps", type=whole(1), help="steps of the sampler (default 12); without --sampler of a run (default 24)")
    group.add_argument("--form", choices=("all", "last"), default="all", help="fit every step, or only the step to 0 on your own grid")
    group.add_argument("--shift", type=number(0.01, 100), help="your own grid's shift; always the grid of --form last")
    group.add_argument("--difference", action="store_true", help="with guidance: forecast cond - uncond on half of the steps")
    group.add_argument("--teacher", type=whole(1), default=100, help="model calls of the fine reference run that the sampler is fitted to")
    group.add_argument("--samples", type=whole(1, 1000), default=4, help="seeds to fit on")
    group.add_argument("--held-out", type=whole(1, 1000), default=3, help="other seeds, on which it must beat the stock solvers")
    group.add_argument("--batch", type=whole(1), help="seeds in one call of the model; default: 1, and all for a demo")
    group.add_argument("--guidance", type=number(0), help="guidance to calibrate at; default: the pipeline's own, and 2 for a demo")
    reach = "other guidance values to try it at; each is allowed if it wins there"
    group.add_argument("--reach", type=comma_list(number(0)), default=(), metavar="W,...", help=reach)
    group.add_argument("--prompts", type=lines_in, metavar="TEXTFILE", help="one prompt a line; default: eight built-in prompts")
    group.add_argument("--size", type=size, help="WIDTHxHEIGHT, and xFRAMES for video; default: the pipeline's own")
    group.add_argument("--device", default="cpu", help="device of the model, as in cuda")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights of -m")


def check(args: argparse.Namespace) -> None:
    """TqaiError for what cannot be, before the model is loaded."""
    from ..run import device_of
    from .sampler import check_settings

    refuse_ignored(args, PLAIN_ONLY, "it is no option of --sampler")
    if args.demo == "lm":
        raise TqaiError("--demo lm: a sampler is fitted to a diffusion model: give flux, sd3 or wan")
    if args.demo:
        refuse_ignored(args, ("prompts", "size", "device", "dtype"), f"{args.demo} is a mini with data of its own on the CPU")
    device_of(args.device)
    check_settings(*_settings(args), args.form, args.teacher)


def _settings(args: argparse.Namespace) -> tuple[int, range, range]:
    """Steps, seeds to fit on and seeds to prove it on."""
    return (
        12 if args.steps is None else args.steps, range(FIRST, FIRST + args.samples),
        range(FIRST_HELD_OUT, FIRST_HELD_OUT + args.held_out),
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the file and return its content with what it cost."""
    from ..hosts.diffusers.sampler import PipelineModel
    from .sampler import calibrate, extend_guidance_range

    steps, seeds, held_out = _settings(args)
    pipe, inputs = _demo(args) if args.demo else _pipeline(args)
    model = PipelineModel(pipe, inputs, batch=args.batch or (args.samples if args.demo else 1), difference=args.difference)
    began = time.process_time()
    with progress_bar("calibrating") as progress:
        sampler = calibrate(
            model, steps, seeds=seeds, held_out=held_out, form=args.form, shift=args.shift, reference_calls=args.teacher,
            progress=progress,
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
    import torch

    from ..hosts.diffusers.load import pipeline

    prompts: Sequence[str] = args.prompts or PROMPTS
    fixed: dict[str, Any] = dict(zip(("width", "height", "num_frames"), args.size or (), strict=False))
    pipe = pipeline(args.model, getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(args.device)
    if args.guidance is not None:
        fixed["guidance_scale"] = args.guidance
    return pipe, lambda seeds: {"prompt": [prompts[seed % len(prompts)] for seed in seeds], **fixed}
