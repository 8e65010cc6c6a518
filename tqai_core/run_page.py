"""The pages of ``tqai run --compare`` on a pipeline and of ``tqai try``: results, where they differ, what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .closeness import HEAD, Comparison
from .pages import Shown, render
from .plot import charts
from .report import DECISIONS, Report


def page(result: dict[str, Any], against: Comparison, difference: Sequence[str], report: Report) -> str:
    """Of one run beside its exact one. ``difference``: its files. All files lie beside the page."""
    other = result["compare"]
    exact = Shown.beside("exact", [f"{other['seconds']:.2f} s"], other["files"])
    ours = Shown.beside("tqai", [f"{result['seconds']:.2f} s", against.short("picture")], result["files"], difference)
    share = result["seconds"] / other["seconds"]
    saved = f"{share:.0%} of the time of the exact run" if share < 1 else f"{share:.2f} times the time of the exact run: nothing is saved"
    return sheet(
        f"tqai run: {result['pipeline']}", f"{report.calls_skipped} of {report.calls} model calls were forecast; it took {saved}, and the "
        f"result is {against.short('picture')}.", f"{result['prompt']} (seed {result['seed']})",
        bars=[(name, run["seconds"], f"{run['seconds']:.2f} s") for name, run in (("exact", other), ("tqai", result))],
        pictures_shown=[exact, ours], slide=(exact, ours), tables=[("How close", HEAD, against.table())], report=report,
    )  # fmt: skip


def sheet(
    title: str, verdict: str, about: str, bars: Sequence[tuple[str, float, str]], pictures_shown: Sequence[Shown] = (),
    slide: tuple[Shown, Shown] | None = None, texts: Sequence[tuple[str, str]] = (), tables: Sequence[Any] = (),
    paste: Sequence[tuple[str, str]] = (), report: Report | None = None, notes: Sequence[str] = (), place: str = "",
) -> str:  # fmt: skip
    """``report``: of the run whose decisions are shown."""
    report = report or Report()
    notes = [*notes, *report.warnings, *(f"exact: {f['where']}: {f['why']}" for f in report.fallbacks)]
    return render(
        "compare", title=title, verdict=verdict, about=about, bars=bars, pictures_shown=pictures_shown, slide=slide, texts=texts,
        tables=tables, paste=paste, charts=charts(report.decisions) if report.decisions else (),
        decided=f"{report.calls_skipped} of {report.calls} model calls skipped.", steps=(DECISIONS, report.rows()), notes=notes,
        place=place,
    )  # fmt: skip
