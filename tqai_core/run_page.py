"""The page of ``tqai run --compare`` on a pipeline: both results, where they differ, what was decided."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .closeness import HEAD, Comparison
from .pages import sheet, table
from .plot import chart
from .report import DECISIONS, Report


def page(result: dict[str, Any], against: Comparison, difference: Sequence[str], report: Report) -> str:
    """``difference``: its files. All files lie beside the page."""
    other = result["compare"]
    shown = ((f"tqai, {result['seconds']:.2f} s", result["files"]), (f"exact, {other['seconds']:.2f} s", other["files"]))
    parts = [
        f"<p>{html.escape(result['prompt'])} (seed {result['seed']})</p>",
        f"<div class=row>{''.join(_figure(*one) for one in (*shown, ('difference, white where it is largest', difference)))}</div>",
        table(HEAD, against.table()),
        f"<h2>Decisions</h2><p>{report.calls_skipped} of {report.calls} model calls skipped.</p>{chart(report.decisions)}",
        table(DECISIONS, report.rows()),
        *(f"<p>{html.escape(text)}</p>" for text in [*report.warnings, *(f"exact: {f['where']}: {f['why']}" for f in report.fallbacks)]),
    ]
    return sheet(f"tqai run: {result['pipeline']}", parts)


def _figure(title: str, files: Sequence[str]) -> str:
    names = [quote(Path(file).name) for file in files]
    seen = (f'<video src="{n}" controls loop muted></video>' if n.endswith(".mp4") else f'<img src="{n}" alt="{title}">' for n in names)
    return f"<figure><figcaption>{title}</figcaption>{''.join(seen)}</figure>"
