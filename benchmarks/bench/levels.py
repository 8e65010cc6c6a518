"""What the levels below the model, the guidance difference and the hooks themselves pay or cost, on the trained minis."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tqai_core.config import Config
from tqai_core.metrics import nmse

from .dit import SAMPLES, TRUTH, labels_of
from .harness import Mini, Row, Run, Table, closing, compare, machine, medians, one_thread, promises

STEPS = 24
SHIFT = 3.0
BRANCH_CALLS = 24  # of the guidance rows: twelve steps of cond and uncond
HALF = "fixed:interval=2"
ROUNDS = 16  # of the overhead: one run of a loaded machine says nothing

ATTENTION = {
    "plain reuse": Config(level="attention", strategy="delta", monitor=HALF, codec="exact"),
    "order 1": Config(level="attention", strategy="delta2", monitor=HALF, codec="exact"),
    "order 1, 6 + 3 bits": Config(level="attention", strategy="delta2", monitor=HALF, codec="turbo:bits=6"),
    "order 1, 6 + 2 bits": Config(level="attention", strategy="delta2:slope_bits=2", monitor=HALF, codec="turbo:bits=6"),
    "order 1, 8 + 3 bits": Config(level="attention", strategy="delta2", monitor=HALF, codec="turbo:bits=8"),
    "tiered by change, 8/6 + 3 bits": Config(level="attention", scorer="change", strategy="tiered", monitor=HALF),
    "blocks, order 1, 6 + 3 bits": Config(level="block", strategy="delta2", monitor=HALF, codec="turbo:bits=6"),
    "model, order 1, 8 + 3 bits": Config(level="model", strategy="delta2", monitor=HALF, codec="turbo:bits=8"),
}
SCHEDULE = "sparse attention, a quarter of the key blocks; four full steps, then every 3rd, and the last"
THIRD, FOURTH = "fixed:interval=3,warmup=4", "fixed:interval=4,warmup=4"  # the roughest steps are the first: all in full
WINDOW = {
    "window, frozen, order 1": ("window:far=none,residual=1", None, THIRD),
    "window, frozen, order 0": ("window:far=none,residual=0", None, THIRD),
    "bsa, frozen, order 1": ("window:far=none,residual=1", "bsa", THIRD),
    "bsa, frozen, order 0": ("window:far=none,residual=0", "bsa", THIRD),
    "bsa, chosen anew, order 0": ("window:far=none,residual=0,frozen=false,fade=0", "bsa", THIRD),
    "bsa, chosen anew, order 0, fading": ("window:far=none,residual=0,frozen=false", "bsa", THIRD),
    "bsa, chosen anew, order 1": ("window:far=none,residual=1,frozen=false", "bsa", THIRD),
    "bsa, frozen, order 1, full every 4th": ("window:far=none,residual=1", "bsa", FOURTH),
    "bsa, chosen anew, order 0, full every 4th": ("window:far=none,residual=0,frozen=false,fade=0", "bsa", FOURTH),
}


def bench(
    kinds: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Everything, as plain data. ``rounds`` of the overhead; the rest runs once a seed."""
    one_thread()
    tables: dict[str, Any] = {}
    for kind in kinds:
        mini = Mini(kind)
        tell(f"{kind}: attention and block level")
        tables[kind] = {"attention": _rows(mini, seeds, ATTENTION)}
        tell(f"{kind}: sparse attention with a carried residual")
        configs = {
            name: Config(level="attention", strategy=strategy, scorer=scorer, monitor=monitor, codec="exact")
            for name, (strategy, scorer, monitor) in WINDOW.items()
        }
        tables[kind]["window"] = _rows(mini, seeds, configs)
        tell(f"{kind}: the guidance difference")
        tables[kind]["guidance"] = _guidance(mini, seeds)
        tell(f"{kind}: overhead of hooks that skip nothing")
        tables[kind]["overhead"] = _overhead(mini, rounds)
    return {
        "bench": "levels", "machine": machine(), "seeds": list(seeds), "steps": STEPS, "samples": SAMPLES, "window": SCHEDULE,
        "tables": tables,
        "verdicts": [v for kind in kinds for v in verdicts(kind, tables[kind])],
    }  # fmt: skip


def _rows(mini: Mini, seeds: Sequence[int], configs: dict[str, Config]) -> list[Row]:
    mini.schedule("euler", 1.0)
    found: dict[str, list[Row]] = {name: [] for name in configs}
    for seed in seeds:
        labels = labels_of(mini.kind, seed)
        exact = mini.run(labels, seed, STEPS)
        for name, config in configs.items():
            run = mini.run(labels, seed, STEPS, config)
            report = run.report
            assert report is not None
            shares = {"calls_skipped": report.calls_skipped / report.calls, "cpu": exact.seconds / run.seconds}
            held = {"held": report.bytes_held_peak, "fp16": report.bytes_exact}
            found[name].append(shares | held | compare(mini, run, exact))
    return [{"method": name, **medians(rows)} for name, rows in found.items()]


def _guidance(mini: Mini, seeds: Sequence[int]) -> list[Row]:
    """UniPC at shift 3 with as many branch calls: both branches at every step, or more steps and half of the uncond."""
    config = Config(strategy="delta2:cfg=difference", monitor="fixed:interval=1,min_steps=1")
    calls = BRANCH_CALLS
    rows: dict[str, list[Row]] = {}
    for seed in seeds:
        labels = labels_of(mini.kind, seed)
        mini.schedule("ab2", 2.0)
        truth = mini.run(labels, seed, TRUTH).latents
        mini.schedule("unipc", SHIFT)
        runs = {f"both branches, {calls // 2} steps": (calls // 2, None)}
        runs |= {f"difference on half of the uncond, {n} steps": (n, config) for n in (15, 16)}
        for name, (steps, chosen) in runs.items():
            run = mini.run(labels, seed, steps, chosen)
            spent = steps * 2 if chosen is None else _spent(run)
            rows.setdefault(name, []).append({"branch_calls": spent, "ode": nmse(run.latents, truth)})
    return [{"method": name, **medians(found)} for name, found in rows.items()]


def _spent(run: Run) -> float:
    """Calls of one branch that were computed; SD3 runs both as one batch, its report counts the halves."""
    assert run.report is not None
    return run.report.calls - run.report.calls_skipped


def _overhead(mini: Mini, rounds: int) -> list[Row]:
    """CPU time of generations under a pipeline that computes every step, over those without: medians of interleaved runs
    of the size that all tables have. Applying and removing are not in it."""
    mini.schedule("euler", 1.0)
    labels = labels_of(mini.kind, 0)
    rows = []
    watching = {"idle": "lyapunov:min_steps=1000", "watching": "lyapunov:tau=1e-9,min_steps=1"}  # too short a schedule; never sure
    for (what, monitor), level in itertools.product(watching.items(), ("model", "block", "attention")):
        config = Config(level=level, monitor=monitor)
        ratios = []
        for _ in range(rounds if what == "idle" else max(rounds // 4, 1)):
            before, with1, with2, after = (mini.run(labels, 0, 4, chosen).seconds for chosen in (None, config, config, None))
            ratios.append((with1 + with2) / (before + after))
        rows.append({"level": level, "state": what, "ratio": median(ratios)})
    return rows


def verdicts(kind: str, table: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """What the issue asks of these figures."""
    attention = {row["method"]: row for row in table["attention"]}
    window = {row["method"]: row for row in table["window"]}
    plain, exact, coded = attention["plain reuse"], attention["order 1"], attention["order 1, 6 + 2 bits"]
    both, *spared = table["guidance"]
    equal = [row for row in spared if row["branch_calls"] <= both["branch_calls"]]
    gain = both["ode"] / equal[0]["ode"] if equal else 0.0
    out: list[Row] = []
    need = promises(out, kind)
    need("attention, every 2nd: order 1 / plain reuse", exact["nmse"] / plain["nmse"], most=0.5)
    need("attention, every 2nd: 6 + 2 bits / uncoded error", coded["nmse"] / exact["nmse"], most=1.3)
    need("attention, every 2nd: two fp16 tensors / bytes held", coded["fp16"] / coded["held"], least=3.5)
    need("guidance difference, UniPC shift 3, 12 calls: ODE error without / with", gain, least=1.4 if kind == "wan" else 1 / 1.05)
    idle = max(row["ratio"] for row in table["overhead"] if row["state"] == "idle") - 1
    need("overhead of idle hooks", idle, most=0.015)
    if kind == "wan":
        ratio = window["bsa, chosen anew, order 0"]["nmse"] / window["bsa, frozen, order 1"]["nmse"]
        need("window: order 0 chosen anew / order 1 frozen", ratio, least=2.5)
    return out


def tables_of(result: Row) -> list[Table]:
    """Every table, the verdicts last."""
    out: list[Table] = []
    for kind, table in result["tables"].items():
        titles = {"attention": "attention and block level, every 2nd step"}
        titles["window"] = result.get("window", "sparse attention, full every 4th step")
        for name, what in titles.items():
            out.append((f"{kind}: {what}", *caches(table[name])))
        out.append((f"{kind}: UniPC at shift {SHIFT:g}, equal branch calls", *guidance(table["guidance"])))
        rows = [[r["level"], r["state"], f"{r['ratio'] - 1:+.1%}"] for r in table["overhead"]]
        out.append((f"{kind}: CPU time of hooks where nothing is skipped", ["level", "pipeline", "more time"], rows))
    return [*out, *closing(result)]


def caches(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "sites skipped", "CPU ratio", "PSNR dB", "NMSE e-4", "same label", "bytes held / as fp16"]
    return head, [
        [
            r["method"], f"{r['calls_skipped']:.0%}", f"{r['cpu']:.2f}", f"{r['psnr']:.1f}", f"{r['nmse'] * 1e4:.2f}",
            f"{r['agreement']:.3f}", f"{r['held']:,.0f} / {r['fp16']:,.0f}",
        ]
        for r in rows
    ]  # fmt: skip


def guidance(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    return ["method", "branch calls", "true ODE, NMSE e-4"], [
        [r["method"], f"{r['branch_calls']:g}", f"{r['ode'] * 1e4:.2f}"] for r in rows
    ]
