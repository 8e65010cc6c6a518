"""``tqai demo``: each mini with one seed, exact, with tqai, and with fewer steps, all pictures as one batch and one at a time; a table and
a page of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from .config import preset
from .demo_page import OURS, page, section
from .errors import TqaiError
from .measure import Mini, Run, compare, machine, one_thread, tails
from .minis.names import KINDS, present, weights
from .progress import progress_bar

STEPS = 24
METHODS = ("exact", OURS, "tqai fast", "fewer steps")
COUNT = {"flux": 10, "sd3": 10, "wan": 5}
PSNR = ("psnr", "psnr_tail", "psnr_worst")


def run(out: Path, kinds: Sequence[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """Generate, measure, draw; writes ``out/index.html`` and the pictures, returns the figures as plain data. Without ``kinds``: all minis
    that are here."""
    kinds = present() if kinds is None else kinds
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise TqaiError(f"unknown mini {', '.join(unknown)}; known: {', '.join(KINDS)}")
    for kind in kinds:
        weights(kind)
    one_thread()
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "seed": seed, "steps": STEPS, "count": COUNT, "rows": [], "alone": [], "decisions": {}}
    sections = []
    with progress_bar("loading") as progress:
        for nth, kind in enumerate(kinds):
            mini = Mini(kind)
            mini.schedule("euler", 1.0)
            labels = list(range(COUNT[kind]))
            mini.run(labels, seed, 1)  # warm caches are part of no figure
            progress(f"{kind}: all as one batch", nth / len(kinds))
            runs = _runs(mini, labels, seed)
            rows = {row["method"]: tails(row) for row in _rows(mini, runs)}
            result["rows"] += rows.values()
            singles = []
            for i, label in enumerate(labels):
                progress(f"{kind}: one at a time", (nth + (1 + i / len(labels)) / 2) / len(kinds))
                singles.append(_rows(mini, _runs(mini, [label], seed + i)))
            result["alone"] += [_alone(rows) for rows in list(zip(*singles, strict=True))[1:]]
            result["decisions"][kind] = runs[OURS].report.decisions  # type: ignore[union-attr]
            sections.append(section(mini, labels, runs, rows, out))
    (out / "index.html").write_text(page(sections, f"Seed {seed}. {_place(result)}"), encoding="utf-8")
    return result


def _runs(mini: Mini, labels: Sequence[int], seed: int) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for method in METHODS:
        config = preset(method.split()[1], mini.kind) if method.startswith("tqai") else None
        steps = round(runs[OURS].calls / runs["exact"].calls * STEPS) if method == "fewer steps" else STEPS
        runs[method] = mini.run(labels, seed, steps, config)
    return runs


def _rows(mini: Mini, runs: dict[str, Run]) -> list[dict[str, Any]]:
    exact, rows = runs["exact"], []
    for method, r in runs.items():
        row = {
            "mini": mini.kind, "method": method, "calls": r.calls, "skipped": exact.calls - r.calls,
            "cpu_ratio": exact.seconds / r.seconds, "held": r.report.bytes_held_peak if r.report else 0,
            "fp16": r.report.bytes_exact if r.report else 0, **compare(mini, r, exact),
        }  # fmt: skip
        rows.append(row | {"psnr": None} if method == "exact" else row)
    return rows


def _alone(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's runs of one picture each."""
    psnr = [row["psnr"] for row in rows]
    return {
        "mini": rows[0]["mini"], "method": rows[0]["method"], "runs": len(rows), "calls": mean(row["calls"] for row in rows),
        "psnr": median(psnr), **tails({"psnr_each": psnr}), "agreement": mean(row["agreement"] for row in rows),
    }  # fmt: skip


def tables_of(result: dict[str, Any]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    decibels = lambda r: ["exact"] * 3 if r["psnr"] is None else [f"{r[key]:.1f}" for key in PSNR]  # noqa: E731
    head = ["mini", "method", "model calls", "skipped", "CPU ratio", "PSNR dB", "5 %", "least", "same label", "bytes held", "as fp16"]
    rows = [
        [
            r["mini"], r["method"], str(r["calls"]), str(r["skipped"]), f"{r['cpu_ratio']:.2f}",
            *decibels(r), f"{r['agreement']:.3f}", f"{r['held']:,}", f"{r['fp16']:,}",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    what = "latent PSNR of the batch, then of single pictures the 5 % quantile and the least"
    yield f"{STEPS} Euler steps, guidance 2, seed {result['seed']}, one batch a mini: {what}; {_place(result)}", head, rows
    head = ["mini", "method", "runs", "mean calls", "PSNR dB, median", "5 %", "least", "same label"]
    rows = [[r["mini"], r["method"], str(r["runs"]), f"{r['calls']:.1f}", *decibels(r), f"{r['agreement']:.3f}"] for r in result["alone"]]
    yield f"the same labels, one picture or clip a run, seeds from {result['seed']} on", head, rows


def _place(result: dict[str, Any]) -> str:
    m = result["machine"]
    return f"{m['cpu']}, 1 thread, torch {m['torch']}"
