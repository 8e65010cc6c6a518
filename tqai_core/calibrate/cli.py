"""``tqai calibrate`` and ``tqai tune``: arguments, and the tables that are printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import comma_list, lines_in, out_file, refuse_ignored, seed, text_in, whole, write_out
from ..errors import TqaiError
from ..progress import progress_bar

if TYPE_CHECKING:
    from ..hosts.calibration_targets import CalibrationTarget
    from .file import Calibration

DEMOS = ("flux", "sd3", "wan")
FIXED = "its data are fixed: {} is a mini"


def add_tune(parser: argparse.ArgumentParser) -> None:
    """What ``tqai tune`` takes; :func:`target_of` reads those that name a model and its data."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-m", "--model", type=Path, metavar="FOLDER", help="a diffusers pipeline")
    which.add_argument("--demo", choices=DEMOS, help="a mini that ships with tqai")
    parser.add_argument("--prompts", type=lines_in, metavar="FILE", help="one prompt a line")
    _add_part(parser)
    parser.add_argument("--steps", type=whole(1), default=24, help="sampler steps of a run")
    parser.add_argument("--batch", type=whole(1), metavar="N", help="samples a seed")
    parser.add_argument("--budget", default="calls=0.5", help="calls=SHARE or time=SHARE of the exact run, or bytes=HELD")
    parser.add_argument("--trials", type=whole(1), default=40, help="finished trials to reach, those of a resumed study counted")
    parser.add_argument("--study", type=out_file, default="out/tune.db", metavar="FILE", help="SQLite file; resumed where it exists")
    parser.add_argument("--sampler", default="nsga2", choices=("nsga2", "tpe"), help="how candidates are proposed")
    levels = comma_list(str, ("model", "block", "attention"))
    parser.add_argument("--levels", type=levels, default=("model",), help="levels to search, as in model,block")
    parser.add_argument("-o", "--out", type=out_file, default="out/tuned.json", metavar="FILE", help="the best Config, as JSON")
    entry = "find the tolerances of the three presets for this model instead, and write them; tqai.preset(NAME, family=FILE) reads them"
    parser.add_argument("--family", type=out_file, metavar="FILE.json", help=f"{entry}; --out is preset balanced then")
    parser.add_argument("--plot", type=out_file, metavar="FILE", help="error against cost of all trials, as SVG")


def _add_part(parser: Any) -> None:
    expert = "pipelines: transformer, or transformer_2 for WAN 2.2's second expert"
    parser.add_argument("--part", choices=("transformer", "transformer_2"), default="transformer", help=expert)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tqai calibrate`` takes without ``--sampler``; -m, --demo, -o, --steps, --batch and --prompts are there already."""
    group = parser.add_argument_group("without --sampler")
    group.add_argument("--text", type=text_in, metavar="FILE", help="language models: text to calibrate on")
    _add_part(group)
    group.add_argument("--seeds", type=comma_list(seed), default=(100, 101, 102, 103), help="seeds to measure on, as in 100,101")
    group.add_argument("--bands", type=whole(1), default=3, help="pipelines: sigma bands of the sensitivities")
    group.add_argument("--probes", type=whole(1), help="backward passes a call; default 1, language models 4")
    group.add_argument("--bits", type=whole(1, 8), default=4, help="bits of the calibrated bases")
    group.add_argument(
        "--average", type=whole(2, 6), default=3, help="average bits of a number, shared out among heads, layers and sigma bands"
    )
    group.add_argument("--codec", default="turbo", choices=("turbo", "trellis"), help="the codec whose errors are measured")


def tune(args: argparse.Namespace) -> dict[str, Any]:
    from ..config import Config
    from ..hosts.calibration_targets import Diffusion
    from .page import pareto
    from .tune import Budget, check_study_file, tune

    if args.demo:
        refuse_ignored(args, ("prompts", "part"), FIXED.format(args.demo))
    elif not (args.model / "model_index.json").is_file():
        raise TqaiError(f"{args.model} is no folder of a diffusers pipeline (model_index.json), whose pipelines tune searches: give one; "
                        "for a language model give Config(level='kv') a scorer or bits")  # fmt: skip
    if args.family:
        return _family(args)
    budget = Budget.parse(args.budget)
    check_study_file(args.study)
    with progress_bar("tuning") as progress:
        target = target_of(args)
        assert isinstance(target, Diffusion)
        found = tune(target, budget, args.study, args.trials, args.sampler, args.levels, progress=progress)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(Config.from_dict(found["config"]).to_json() + "\n")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(pareto(found))
    return found


def _family(args: argparse.Namespace) -> dict[str, Any]:
    from ..config import preset
    from ..files import write_text
    from ..hosts.calibration_targets import Diffusion
    from .family import STEPS, measure

    search = ("steps", "budget", "trials", "study", "sampler", "levels", "plot")
    refuse_ignored(args, search, f"--family tries tolerances alone, at {STEPS} steps, and searches no pipelines")
    if args.family.suffix != ".json":
        raise TqaiError(f"--family {args.family}: give a name that ends in .json")
    with progress_bar("tuning") as progress:
        target = target_of(args)
        assert isinstance(target, Diffusion)
        found = measure(target, args.family.stem, progress)
    write_text(args.family, json.dumps(found, indent=2) + "\n")
    write_out(args.out, preset("balanced", args.family).to_json())
    return found


def target_of(args: argparse.Namespace, bands: int = 3) -> CalibrationTarget:
    """TqaiError for a folder that is no model."""
    from ..hosts import calibration_targets

    steps = 24 if args.steps is None else args.steps
    if args.demo:
        return calibration_targets.demo(args.demo, args.batch, steps, bands)
    text = getattr(args, "text", None) or ""
    return calibration_targets.folder(Path(args.model), args.prompts or [], text, steps, bands, args.part, args.batch or 1)


def check(args: argparse.Namespace) -> None:
    """TqaiError for what cannot be, before the model is loaded."""
    from .run import check_seeds
    from .sampler_cli import SAMPLER_ONLY

    refuse_ignored(args, SAMPLER_ONLY, "it is an option of --sampler, which is not")
    check_seeds(args.seeds)
    is_file = lambda name: args.demo is None and (Path(args.model) / name).is_file()  # noqa: E731
    if args.demo:
        refuse_ignored(args, ("prompts", "text", "part"), FIXED.format(args.demo))
    if args.demo in DEMOS or is_file("model_index.json"):
        refuse_ignored(args, ("text",), "this is a pipeline")
        if args.bands > (steps := 24 if args.steps is None else args.steps):
            raise TqaiError(f"--bands {args.bands}: give 1 to {steps}, the number of steps")
    elif args.demo == "lm" or is_file("config.json"):
        refuse_ignored(args, ("prompts", "part", "steps", "bands"), "this is a language model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the file and return what it says."""
    from .run import calibrate

    with progress_bar("calibrating") as progress:
        target = target_of(args, args.bands)
        return summary(calibrate(target, args.output, args.seeds, args.probes, args.bits, args.average, args.codec, progress))


def summary(made: Calibration) -> dict[str, Any]:
    """The header as plain data, bases counted."""
    verdicts = [v for heads in made.header["verdicts"]["bases"].values() for v in heads]
    mean = lambda what: sum(v[what] for v in verdicts) / max(len(verdicts), 1)  # noqa: E731
    kept = sum(v["kept"] == "klt" for v in verdicts)
    bases = {"kept": kept, "of": len(verdicts), "klt": mean("klt"), "hadamard": mean("hadamard")}
    return {**made.header, "verdicts": {**made.header["verdicts"], "bases": bases}}


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
    if cache := found["verdicts"].get("cache"):
        tried = "; ".join(f"{t['average']:g} bits shared {t['shared']:.2e}, equal {t['uniform']:.2e}" for t in cache["bits"])
        shaped = f"plain {cache['plain']:.2e}, shaped {cache['shaped_k']:.2e}: {'kept' if cache['kept'] else 'not kept'}"
        rows += [["caches, KL of bits by layer", tried], ["caches, KL of shaped errors of keys", shaped]]
    return [("calibration", ["what", "measured"], rows)]
