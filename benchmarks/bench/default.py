"""``tqai bench default``: what the tolerance of a class that nobody tuned is worth.

Each mini draws one picture at a time, 16 seeds, 24 Euler steps: with the preset of its family, and with what it would get if
nobody had tuned its family: the strictest tolerance of the other families. No tolerance was chosen by the Z-Image mini.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from tqai_core.config import TAUS, Config, preset
from tqai_core.metrics import psnr

from .harness import Mini, Row, Table, closing, machine, one_thread, promises

KINDS = ("flux", "sd3", "wan", "z_image")
STEPS, SEEDS = 24, 16
SHIFTS = (1.0, 3.0)  # as in bench dit, and as most models are sampled
UNTUNED = "untuned"


def bench(kinds: Sequence[str] = KINDS, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress."""
    one_thread()
    rows: list[Row] = []
    for kind in kinds:
        mini = Mini(kind)
        for shift in SHIFTS:
            tell(f"{kind}: {SEEDS} seeds at shift {shift:g}")
            rows += _measure(mini, shift)
    result = {"bench": "default", "machine": machine(), "steps": STEPS, "seeds": list(range(SEEDS)), "rows": rows}
    return result | {"verdicts": verdicts(result)}


def presets_of(kind: str) -> dict[str, Config]:
    """The family's preset, if it is tuned, and the one that a class gets which is not."""
    taus = dict(TAUS["balanced"])
    tuned = {kind: preset("balanced", kind)} if taus.pop(kind, None) else {}
    return {**tuned, UNTUNED: replace(preset("balanced"), monitor={"name": "lyapunov", "tau": min(taus.values())})}


def _measure(mini: Mini, shift: float) -> list[Row]:
    """One row a preset: medians and the worst seed."""
    presets = presets_of(mini.kind)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in presets}
    mini.schedule("euler", shift)
    for seed in range(SEEDS):
        label = [3 * seed % 10]
        exact = mini.run(label, seed, STEPS)
        for name, config in presets.items():
            run = mini.run(label, seed, STEPS, config)
            found[name].append((run.calls / exact.calls * STEPS, psnr(run.latents, exact.latents)))
    return [
        {
            "mini": mini.kind, "shift": shift, "preset": name, "calls": median(calls), "most": max(calls),
            "skipped": 1 - sum(calls) / len(calls) / STEPS, "psnr": median(db), "least": min(db),
        }
        for name, pairs in found.items() for calls, db in [tuple(zip(*pairs, strict=True))]
    ]  # fmt: skip


def verdicts(result: Row) -> list[Row]:
    """What the default promises: beside the family's own preset, and where there is none."""
    at = {(r["mini"], r["shift"], r["preset"]): r for r in result["rows"]}
    out: list[Row] = []
    for (kind, shift, name), row in at.items():
        if name != UNTUNED:
            continue
        need = promises(out, kind)
        if (tuned := at.get((kind, shift, kind))) is None:
            need(f"shift {shift:g}: calls skipped", row["skipped"], least=0.45)
            need(f"shift {shift:g}: PSNR of the worst seed, dB", row["least"], least=45.0)
            continue
        need(f"shift {shift:g}: dB below the family's preset, worst seeds", tuned["least"] - row["least"], most=3.0)
        need(f"shift {shift:g}: calls more than with the family's preset", row["calls"] - tuned["calls"], most=2.0)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    """(title, head, rows) for a terminal or Markdown."""
    db = lambda v: "exact" if v is None or math.isinf(v) else f"{v:.1f}"  # noqa: E731
    head = ["mini", "shift", "preset", "calls", "most", "skipped", "PSNR dB", "least"]
    yield (
        f"one picture, {len(result['seeds'])} seeds, {result['steps']} Euler steps: the family's preset and the default",
        head,
        [
            [
                r["mini"], f"{r['shift']:g}", r["preset"], f"{r['calls']:g}", f"{r['most']:g}", f"{r['skipped']:.0%}", db(r["psnr"]),
                db(r["least"]),
            ]
            for r in result["rows"]
        ],
    )  # fmt: skip
    yield from closing(result)
