"""``tqai try`` on a diffusers pipeline: presets in turn, a run of fewer steps beside them, the fastest one that is close."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...closeness import Closeness
from ...config import Config, preset
from ...errors import TqaiError
from ...pages import Shown
from ...progress import progress_bar
from ...report import Report
from ...run_page import sheet
from . import minis
from .load import pipeline_code
from .run import Outcome, Runner, form, save

STEPS = 24  # of a mini
FEWER = "fewer steps"
HEAD = ["setting", "seconds", "times as fast", "model calls", "PSNR dB", "SSIM", "largest error", "peak memory"]
PROMPT = "a red fox in the snow, photograph"


@dataclass(frozen=True)
class Row:
    """One setting: what it gave, how close that is, and the words that set it in a script and in a graph."""

    name: str
    outcome: Outcome
    close: Closeness | None  # None: the exact run
    calls: tuple[int, int] = (0, 0)  # computed, asked for
    script: str = ""
    graph: str = ""
    files: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.outcome.figures["seconds"]

    @property
    def saved(self) -> int:
        return self.calls[1] - self.calls[0]

    def cells(self, exact: Row) -> list[str]:
        peak = self.outcome.figures["peak"]["bytes"]
        cells = [self.name, f"{self.seconds:.2f}", f"{exact.seconds / self.seconds:.2f}", f"{self.calls[0]} of {self.calls[1]}"]
        close = (
            ["", "", ""] if self.close is None else [part.removesuffix(" dB").removesuffix(" of the range") for part in self.close.cells()]
        )
        return [*cells, *close, "not measured" if peak is None else f"{peak / 2**20:.1f} MiB"]

    def to_dict(self) -> dict[str, Any]:
        close = vars(self.close) if self.close else {}
        return {
            "setting": self.name,
            **self.outcome.figures,
            "computed": self.calls[0],
            "calls": self.calls[1],
            **close,
            "files": self.files,
        }


def settings(family: str | None) -> Iterator[tuple[str, Config, str, str]]:
    """(name, pipeline, its words in a script, its words in a graph), in the order in which they are tried."""
    named = f', family="{family}"' if family else ""
    for name in ("balanced", "fast", "quality"):
        yield name, preset(name, family), f'tqai.preset("{name}"{named})', f"preset {name}, level model"
    for name, base, factor in (("faster", "fast", 2.0), ("finer", "quality", 0.5)):
        tau = round(preset(base, family).build()[2].tau * factor, 4)  # type: ignore[union-attr]
        monitor = f"lyapunov:tau={tau:g}"
        yield (
            f"{name} (tau {tau:g})",
            Config(monitor=monitor),
            f'tqai.Config(monitor="{monitor}")',
            f"TQAI Monitor lyapunov with tau {tau:g}",
        )


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    until = time.perf_counter() + 60 * args.minutes
    with progress_bar("loading") as tell:
        runner = _mini(args, device) if args.mini else _folder(args, device)
        tell("exact", 0.1)
        runner.warm(None)
        exact = Row("exact", runner.go(None), None)
        rows = []
        for nth, row in enumerate(_tried(runner, exact, args.psnr, until)):
            rows.append(row)
            tell(row.name, 0.2 + 0.12 * nth)
        report = rows[0].outcome.report
        assert report is not None
        exact = Row("exact", exact.outcome, None, (report.calls, report.calls))
        best = chosen(rows, args.psnr)
        if best is not None and (fewer := _fewer(runner, exact, best)) is not None:
            rows.append(fewer)
    return _told(args, runner, exact, rows, best)


def _mini(args: argparse.Namespace, device: torch.device) -> Runner:
    digits = re.findall(r"\d", args.prompt or "3")
    if not digits:
        raise TqaiError(f"--prompt {args.prompt!r}: a mini draws digits: give some, as in --prompt 37")
    if foreign := [name for name in ("height", "width", "frames") if getattr(args, name) is not None]:
        raise TqaiError(f"--{foreign[0]} asked, but {args.model} is a mini of one size: leave it out")
    args.prompt = " ".join(digits)
    inputs = minis.inputs(args.model, [int(d) for d in digits], 2.0 if args.guidance is None else args.guidance)
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    return Runner(minis.pipeline(args.model).to(device), inputs | {"num_inference_steps": args.steps or STEPS}, args.seed, device)


def _folder(args: argparse.Namespace, device: torch.device) -> Runner:
    args.prompt, args.negative = args.prompt or PROMPT, None
    return Runner.of(args, device)


def _tried(runner: Runner, exact: Row, least: float, until: float) -> Iterator[Row]:
    """The presets, and where all of them are close one that is faster, where none is one that is finer; as long as there is time."""
    rows: list[Row] = []
    for name, config, script, graph in settings(runner.family):
        near = [row for row in rows if row.close is not None and row.close.psnr >= least]
        if (name.startswith("faster") and len(near) < len(rows)) or (name.startswith("finer") and near):
            continue
        if rows and (not rows[0].saved or time.perf_counter() + exact.seconds > until):
            return  # what forecasts nothing at one tolerance is no flow model, or too short a schedule: the report says which
        if not rows:
            runner.warm(config)
        out = runner.go(config)
        assert out.report is not None
        rows.append(_row(name, out, exact.outcome, out.report, script, graph))
        yield rows[-1]


def _row(name: str, out: Outcome, exact: Outcome, report: Report, script: str = "", graph: str = "") -> Row:
    return Row(name, out, out.against(exact).rows["picture"], (report.calls - report.calls_skipped, report.calls), script, graph)


def chosen(rows: list[Row], least: float) -> Row | None:
    """Of those that saved calls and are close, the one of the fewest calls; of equals the closest."""
    near = [row for row in rows if row.saved and row.close is not None and row.close.psnr >= least]
    return min(near, key=lambda row: (row.calls[0], -row.close.psnr), default=None)  # type: ignore[union-attr]


def _steps(runner: Runner) -> int | None:
    found = runner.inputs.get("num_inference_steps") or getattr(runner.known.get("num_inference_steps"), "default", None)
    return found if isinstance(found, int) else None


def _fewer(runner: Runner, exact: Row, best: Row) -> Row | None:
    """The plain sampler with as many calls as ``best``: what tqai has to be closer than."""
    if (steps := _steps(runner)) is None:
        return None
    count = max(round(steps * best.calls[0] / best.calls[1]), 1)
    out = runner.go(None, num_inference_steps=count)
    calls = round(best.calls[1] * count / steps)
    return Row(f"{FEWER} ({count})", out, out.against(exact.outcome).rows["picture"], (calls, calls))


def _verdict(exact: Row, rows: list[Row], best: Row | None, least: float) -> str:
    if not rows[0].saved:
        report = rows[0].outcome.report
        why = [*report.warnings, *(f["why"] for f in report.fallbacks)] if report else []
        return f"It does not help here: no call was forecast, and the result is the exact one. {why[0] if why else ''}".strip()
    if best is None:
        near = max((row for row in rows if row.close), key=lambda row: row.close.psnr)  # type: ignore[union-attr]
        return (
            f"It does not help here: no setting came within {least:g} dB of the exact result; the closest, {near.name}, is "
            f"{near.close.psnr:.1f} dB close. Ask for less with --psnr, or take more steps."  # type: ignore[union-attr]
        )
    assert best.close is not None
    ratio = exact.seconds / best.seconds
    close = "identical to the exact result" if best.close.identical else f"{best.close.psnr:.1f} dB close to the exact result"
    close += "" if best.close.identical or math.isnan(best.close.ssim) else f" (SSIM {best.close.ssim:.4f})"
    text = f"computes {best.calls[0]} of {best.calls[1]} model calls, {close}, {best.seconds:.2f} s instead of {exact.seconds:.2f} s"
    fewer = next((row.close.psnr for row in rows if row.name.startswith(FEWER) and row.close), None)
    if fewer is not None and fewer >= best.close.psnr:
        return f"It does not help here: {best.name} {text}, but fewer steps with as many calls are closer ({fewer:.1f} dB): take those."
    if ratio < 1.05:
        return f"It does not help here: {best.name} {text}: calls are forecast, but no time is saved (is the model very small?)."
    words = "" if fewer is None else f" Fewer steps with as many calls are {fewer:.1f} dB close."
    return f"It helps: {best.name} is {ratio:.2f} times as fast. It {text}.{words}"


def _paste(args: argparse.Namespace, runner: Runner, best: Row) -> list[tuple[str, str]]:
    if args.mini:
        opened = f'pipe = minis.pipeline("{args.model}")'
        digits = ", ".join(args.prompt.split())
        call = (
            f'**minis.inputs("{args.model}", [{digits}]), num_inference_steps={runner.inputs["num_inference_steps"]}, output_type="latent"'
        )
        head = "import tqai_core as tqai\nfrom tqai_core import minis\n"
    else:
        opened, head = (
            pipeline_code(args.model, runner.pipe),
            "import torch\nfrom diffusers import DiffusionPipeline\n\nimport tqai_core as tqai\n",
        )
        call = ", ".join(f"{name}={value!r}" for name, value in runner.inputs.items())
    script = f"{head}\n{opened}\nhandle = tqai.apply(pipe, {best.script})\nresult = pipe({call})\nprint(handle.report().to_markdown())\n"
    graph = f"Put the node TQAI Compress last before the sampler: {best.graph}."
    if "Monitor" in best.graph:
        graph = f"Put the node TQAI Compress last before the sampler, and link {best.graph} to its input `pipeline`."
    return [("A script", script), ("ComfyUI", graph)]


def _told(args: argparse.Namespace, runner: Runner, exact: Row, rows: list[Row], best: Row | None) -> dict[str, Any]:
    """The result as plain data; writes the page and its pictures."""
    video, shown = form(None), []
    for row in (exact, *rows):
        word = re.sub(r"\W+", "-", row.name).strip("-")
        row.files.extend(save(row.outcome.pixels, args.out, word, video))
        tenfold = (
            []
            if row is exact
            else save(row.outcome.tenfold(exact.outcome), args.out, f"{word}-difference", video)
            if _same(row, exact)
            else []
        )
        lines = [f"{row.seconds:.2f} s", *([] if row.close is None else [row.close.cells()[0]])]
        shown.append(Shown.beside(row.name, lines, row.files, tenfold))
    verdict, names = _verdict(exact, rows, best, args.psnr), [row.name for row in (exact, *rows)]
    against = shown[names.index(best.name)] if best else shown[1]
    helps = best is not None and verdict.startswith("It helps")
    paste = _paste(args, runner, best) if best and helps else []
    page, table = args.out / "index.html", [row.cells(exact) for row in (exact, *rows)]
    place = f"{runner.device}, torch {torch.__version__}, seed {args.seed}; times of one run each"
    title, report = f"tqai try: {args.model}", (best or rows[0]).outcome.report
    text = sheet(
        title, verdict, f"{runner.name}: {args.prompt}", [(row.name, row.seconds, f"{row.seconds:.2f} s") for row in (exact, *rows)], shown,
        (shown[0], against), tables=[("All settings", HEAD, table)], paste=paste, report=report, place=place,
    )  # fmt: skip
    Path(page).write_text(text, encoding="utf-8")
    return {
        "kind": "pipeline", "title": title, "model": args.model, "pipeline": runner.name, "prompt": args.prompt, "seed": args.seed,
        "device": str(runner.device), "verdict": verdict, "helps": helps, "best": best.name if best and helps else None,
        "rows": [row.to_dict() for row in (exact, *rows)], "table": (HEAD, table), "paste": paste, "page": str(page),
        "report": report.to_dict() if report else None,
    }  # fmt: skip


def _same(row: Row, exact: Row) -> bool:
    return row.outcome.pixels.shape == exact.outcome.pixels.shape
