"""Generations of one picture (or clip) each: there the error control decides for one picture, and a batch averages nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from tqai_core.config import PRESETS, preset

from .harness import Mini, Row, Run, Table, compare, medians

# heads of the median, the quantile and the worst
PSNR, SSIM, NMSE = ["PSNR dB", "5 %", "least"], ["SSIM", "5 %", "least"], ["NMSE e-4", "95 %", "most"]
PRESET, FEWER = "tqai {}", "fewer Euler steps, calls of {}"


def bench(mini: Mini, runs: Sequence[tuple[int, list[int]]], steps: int) -> list[Row]:
    """Two rows a preset over ``runs``, each a seed and its label: the preset, and fewer steps with as many calls as the preset took
    for that very seed."""
    mini.schedule("euler", 1.0)
    found: dict[str, list[Row]] = defaultdict(list)
    for seed, labels in runs:
        exact = mini.run(labels, seed, steps)
        fewer: dict[int, Row] = {}  # by number of calls, which presets share

        def row(run: Run, exact: Run = exact) -> Row:
            return {"calls": run.calls / exact.calls * steps, "skipped": 1 - run.calls / exact.calls, **compare(mini, run, exact)}

        for name in PRESETS:
            ours = row(mini.run(labels, seed, steps, preset(name, mini.family)))
            calls = round(ours["calls"])
            if calls not in fewer:
                fewer[calls] = row(mini.run(labels, seed, calls))
            found[PRESET.format(name)].append(ours)
            found[FEWER.format(name)].append(fewer[calls])
    means = ("calls", "skipped", "agreement")
    return [{"method": method, **medians(rows), **{key: mean(r[key] for r in rows) for key in means}} for method, rows in found.items()]


def tables(kind: str, rows: Sequence[Row], runs: int) -> Table:
    head = ["method", "mean calls", *PSNR, *SSIM, *NMSE, "labels"]
    return (
        f"{kind}: one picture or clip at a time, {runs} seeds: median, 5 % quantile (errors: 95 %) and the worst",
        head,
        [
            [
                r["method"], f"{r['calls']:.1f}", *(f"{r[key]:.1f}" for key in ("psnr", "psnr_tail", "psnr_worst")),
                *(f"{r[key]:.4f}" if key in r else "" for key in ("ssim", "ssim_tail", "ssim_worst")),
                *(f"{r[key] * 1e4:.2f}" for key in ("nmse", "nmse_tail", "nmse_worst")), f"{r['agreement']:.3f}",
            ]
            for r in rows
        ],
    )  # fmt: skip
