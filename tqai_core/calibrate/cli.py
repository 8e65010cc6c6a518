"""``tqai calibrate`` and ``tqai tune``: arguments, and the tables that are printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TqaiError
from ..progress import progress_bar
from ..text import comma_list, lines_in

if TYPE_CHECKING:
    from ..hosts.calibration_targets import CalibrationTarget
    from .file import Calibration

DEMOS = ("flux", "sd3", "wan", "lm")


def add_tune(parser: argparse.ArgumentParser) -> None:
    """What ``tqai tune`` takes; :func:`target_of` reads those that name a model and its data."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-m", "--model", type=Path, metavar="FOLDER", help="a diffusers pipeline or a language model of transformers")
    which.add_argument("--demo", choices=DEMOS, help="a mini that ships with tqai")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="pipelines: one prompt a line")
    _add_data(parser)
    parser.add_argument("--steps", type=int, default=24, help="pipelines: sampler steps of a run")
    parser.add_argument("--batch", type=int, metavar="N", help="samples (or windows of text) a seed")
    parser.add_argument("--budget", default="calls=0.5", help="calls=SHARE or time=SHARE of the exact run, or bytes=HELD")
    parser.add_argument("--trials", type=int, default=40, help="finished trials to reach, those of a resumed study counted")
    parser.add_argument("--study", type=Path, default=Path("out/tune.db"), metavar="FILE", help="SQLite file; resumed where it exists")
    parser.add_argument("--sampler", default="nsga2", choices=("nsga2", "tpe"), help="how candidates are proposed")
    parser.add_argument("--levels", type=comma_list(str), default=("model",), help="levels to search, as in model,block")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/tuned.json"), metavar="FILE", help="the best Config, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="error against cost of all trials, as SVG")


def _add_data(parser: Any) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="language models: text to calibrate on")
    parser.add_argument("--part", default="transformer", help="pipelines: transformer, or transformer_2 for WAN 2.2's second expert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tqai calibrate`` takes without ``--sampler``; -m, --demo, -o, --steps, --batch and --prompts are there already."""
    group = parser.add_argument_group("without --sampler")
    _add_data(group)
    group.add_argument("--seeds", type=comma_list(int), default=(100, 101, 102, 103), help="seeds to measure on, as in 100,101")
    group.add_argument("--bands", type=int, default=3, help="pipelines: sigma bands of the sensitivities")
    group.add_argument("--probes", type=int, help="backward passes a call; default 1, language models 4")
    group.add_argument("--bits", type=int, default=4, help="bits of the calibrated bases")
    group.add_argument("--average", type=int, default=3, help="average bits of a number, shared out among heads, layers and sigma bands")
    group.add_argument("--codec", default="turbo", choices=("turbo", "trellis"), help="the codec whose errors are measured")


def tune(args: argparse.Namespace) -> dict[str, Any]:
    from ..config import Config
    from ..hosts.calibration_targets import Diffusion
    from .page import pareto
    from .tune import Budget, tune

    budget = Budget.parse(args.budget)
    with progress_bar("tuning") as progress:
        target = target_of(args)
        if not isinstance(target, Diffusion):
            raise TqaiError("tune searches pipelines of diffusion models; for a language model give Config(level='kv') a scorer or bits")
        found = tune(target, budget, args.study, args.trials, args.sampler, args.levels, progress=progress)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(Config.from_dict(found["config"]).to_json() + "\n")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(pareto(found))
    return found


def target_of(args: argparse.Namespace, bands: int = 3) -> CalibrationTarget:
    """ValueError for a folder that is no model, and for text or prompts that are not there."""
    from ..hosts import calibration_targets

    steps = 24 if args.steps is None else args.steps
    if args.demo:
        return calibration_targets.demo(args.demo, args.batch, steps, bands)
    for given in (args.prompts, args.text):
        if given is not None and not given.is_file():
            raise TqaiError(f"{given} is not there: give a text file")
    lines = lines_in(args.prompts.read_text()) if args.prompts else []
    text = args.text.read_text() if args.text else ""
    return calibration_targets.folder(Path(args.model), lines, text, steps, bands, args.part, args.batch or 1)


def run(args: argparse.Namespace) -> Calibration:
    from .run import calibrate

    with progress_bar("calibrating") as progress:
        target = target_of(args, args.bands)
        return calibrate(target, args.output, args.seeds, args.probes, args.bits, args.average, args.codec, progress)


def summary(made: Calibration) -> dict[str, Any]:
    """The header as plain data, bases counted."""
    verdicts = [v for heads in made.header["verdicts"]["bases"].values() for v in heads]
    mean = lambda what: sum(v[what] for v in verdicts) / max(len(verdicts), 1)  # noqa: E731
    kept = sum(v["kept"] == "klt" for v in verdicts)
    bases = {"kept": kept, "of": len(verdicts), "klt": mean("klt"), "hadamard": mean("hadamard")}
    return {**made.header, "verdicts": {"bases": bases, "bits": made.header["verdicts"]["bits"]}}


def tables_of(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) for a terminal."""
    bases, bits = found["verdicts"]["bases"], found["verdicts"]["bits"]
    rows = [
        ["model", f"{found['class']} {found['model']}"],
        ["probes a band", ", ".join(map(str, found["samples"]))],
        ["CPU seconds", f"{found['seconds_cpu']:.1f}"],
        ["bases kept", f"{bases['kept']} of {bases['of']}; NMSE on a seed not fitted {bases['klt']:.2e}, rotation {bases['hadamard']:.2e}"],
        [
            f"bits, {bits['average']} on average",
            f"{bits['kept']} kept; loss {bits['fisher']['loss']:.2e} ({bits['how']}), uniform {bits['uniform']['loss']:.2e}",
        ],
        ["bits of keys, values", f"{bits['key_bits']:.2f}, {bits['value_bits']:.2f}"],
    ]
    return [("calibration", ["what", "measured"], rows)]
