"""Every scorer x strategy x monitor on the trained minis, and what each scorer is worth against its absence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tqai_core.config import Config
from tqai_core.registry import REGISTRY, names

from .dit import labels_of
from .harness import Mini, Row, Table, compare, machine, one_thread

STEPS, COUNT, CALLS = 24, 3, 12
TAUS = (0.03, 0.045, 0.06, 0.075, 0.09, 0.12, 0.18)
TIERS = "tiered:share=0.5,high=7,low=5"  # six bits on average, as the uniform row


def scorers() -> list[str | None]:
    """Those that need no file: fisher's table is made by calibration."""
    return [None, *[name for name in names("scorer") if "file" not in REGISTRY["scorer"][name].options()]]


def bench(kinds: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data."""
    one_thread()
    tables: dict[str, Any] = {}
    for kind in kinds:
        mini = Mini(kind)
        mini.schedule("euler", 1.0)
        exact = {seed: mini.run(labels_of(kind, seed, COUNT), seed, STEPS) for seed in seeds}

        def row(config: Config, seed: int, mini: Mini = mini, exact: dict[int, Any] = exact) -> Row:
            run = mini.run(labels_of(mini.kind, seed, COUNT), seed, STEPS, config)
            assert run.report is not None
            saved = 1 - run.calls / exact[seed].calls if config.level == "model" else run.report.calls_skipped / run.report.calls
            return {"saved": saved, "held": run.report.bytes_held_peak, "fp16": run.report.bytes_exact} | compare(mini, run, exact[seed])

        tell(f"{kind}: all triples")
        triples = []
        for scorer, strategy, monitor in itertools.product(scorers(), names("strategy"), names("monitor")):
            level = REGISTRY["strategy"][strategy].levels[0]
            config = Config(scorer=scorer, strategy=strategy, monitor=monitor, level=level)
            found = row(config, seeds[0])
            triples.append({"scorer": scorer or "none", "strategy": strategy, "monitor": monitor, "level": level, **found})
        tell(f"{kind}: each scorer at {CALLS} of {STEPS} calls")
        worth = []
        for scorer in scorers():
            best = [
                min(
                    (
                        r
                        for tau in TAUS
                        if (r := row(Config(scorer=scorer, monitor={"name": "lyapunov", "tau": tau}), seed))["saved"] >= 0.5
                    ),
                    key=lambda r: r["nmse"],
                    default={"nmse": float("nan"), "saved": 0.0},
                )
                for seed in seeds
            ]
            worth.append({"scorer": scorer or "none", "nmse": median(r["nmse"] for r in best), "saved": median(r["saved"] for r in best)})
        tell(f"{kind}: tiers at equal bytes")
        tiers = []
        for scorer, strategy in [(None, "delta2"), *[(s, TIERS) for s in scorers()]]:
            config = Config(level="attention", scorer=scorer, strategy=strategy, monitor="fixed:interval=2", codec="turbo:bits=6")
            rows = [row(config, seed) for seed in seeds]
            name = "uniform 6 bits" if strategy == "delta2" else f"7/5 bits by {scorer or 'size of the change'}"
            tiers.append({"method": name, "nmse": median(r["nmse"] for r in rows), "held": rows[0]["held"]})
        tables[kind] = {"triples": triples, "worth": worth, "tiers": tiers}
    return {
        "bench": "methods", "calls": CALLS, "machine": machine(), "seeds": list(seeds), "steps": STEPS, "samples": COUNT, "tables": tables,
    }  # fmt: skip


def tables_of(result: dict[str, Any]) -> list[Table]:
    """(title, head, rows) of every table."""
    out = []
    for kind, table in result["tables"].items():
        for what, function in (("every triple", triples), (f"scorers at {CALLS} of {STEPS} calls", worth), ("tiers at equal bytes", tiers)):
            head, rows = function(table)
            out.append((f"{kind}: {what}", head, rows))
    return out


def triples(table: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    head = ["scorer", "strategy", "monitor", "level", "saved", "NMSE e-4", "same label", "bytes held / as fp16"]
    return head, [
        [
            r["scorer"], r["strategy"], r["monitor"], r["level"], f"{r['saved']:.0%}", f"{r['nmse'] * 1e4:.2f}", f"{r['agreement']:.3f}",
            f"{r['held']:,} / {r['fp16']:,}",
        ]
        for r in table["triples"]
    ]  # fmt: skip


def worth(table: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    without = table["worth"][0]["nmse"]
    rows = [[r["scorer"], f"{r['saved']:.0%}", f"{r['nmse'] * 1e4:.2f}", f"{r['nmse'] / without:.2f}"] for r in table["worth"]]
    return ["scorer", "saved", "NMSE e-4", "against none"], rows


def tiers(table: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    rows = [[r["method"], f"{r['nmse'] * 1e4:.3f}", f"{r['held']:,}"] for r in table["tiers"]]
    return ["held with", "NMSE e-4", "bytes held"], rows
