"""``tqai bench dit``: forecast-skipping on the minis of digits and of photographs against honest baselines.

Four tables a mini. Medians over the seeds, with the 5 % quantile and the worst of all pictures: (1) Euler, 24 steps, against plain reuse
and fewer steps; (2) the multistep schedulers at shift 3, skipping against half the steps; (3) at equal calls, solvers on a well-chosen
grid against the true ODE, which is Adams-Bashforth 2 with 240 calls at shift 2. (4) Euler, one picture at a time over many seeds. The photo
mini has the first and the last of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from tqai_core.config import Config, preset
from tqai_core.metrics import nmse
from tqai_core.monitors.fixed import Fixed
from tqai_core.types import Step

from . import alone
from .harness import Mini, Row, Run, Table, closing, compare, each, machine, medians, one_thread, promises

STEPS, SHIFT, TRUTH = 24, 3.0, 240
SHIFTS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # grids a well-chosen solver may take; chosen on the calibration seed
CALIBRATION = 77
SAMPLES = {"flux": 10, "sd3": 10, "wan": 6, "z_image": 10, "photo": 4}
ALONE = {"flux": 64, "sd3": 64, "wan": 24, "z_image": 64, "photo": 64}  # seeds from 0 on, of which each is a run of one picture
FLOORS = {"flux": 50.0, "sd3": 45.0, "wan": 40.0, "z_image": 45.0, "photo": 40.0}  # dB, what the presets promise
KINDS = tuple(SAMPLES)
UNTUNED = ("z_image", "photo")  # no preset was chosen by these
PROMPTS = {"photo": 20}  # of the others 10
MULTISTEP = {"z_image": ("unipc",)}  # its pipeline hands over sigmas, which DPM++ does not take


def multistep_of(kind: str) -> tuple[str, ...]:
    return MULTISTEP.get(kind, ("unipc", "dpm++"))


PSNR, NMSE = alone.PSNR, alone.NMSE


def labels_of(kind: str, seed: int, count: int | None = None) -> list[int]:
    return [(i + 3 * seed) % PROMPTS.get(kind, 10) for i in range(count or SAMPLES[kind])]


def bench(kinds: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress."""
    one_thread()
    tables: dict[str, Any] = {}
    for kind in kinds:
        mini = Mini(kind)
        tell(f"{kind}: Euler, {STEPS} steps")
        tables[kind] = {"euler": _over_seeds([_euler(mini, seed) for seed in seeds])}
        if kind != "photo":
            tell(f"{kind}: true ODE, {TRUTH} calls a seed")
            truth = {seed: true_ode(mini, seed) for seed in seeds}
            tell(f"{kind}: UniPC and DPM++ at shift {SHIFT:g}")
            multistep, nodes = _multistep(mini, seeds, truth)
            tell(f"{kind}: solvers on a well-chosen grid")
            tables[kind] |= {"multistep": multistep, "solvers": _solvers(mini, seeds, truth, nodes, multistep)}
        tell(f"{kind}: one picture at a time, {ALONE[kind]} seeds")
        tables[kind]["alone"] = alone.bench(mini, [(seed, labels_of(kind, seed, 1)) for seed in range(ALONE[kind])], STEPS)
    return {
        "bench": "dit", "machine": machine(), "seeds": list(seeds), "steps": STEPS, "guidance": 2.0, "samples": SAMPLES,
        "alone": {kind: ALONE[kind] for kind in kinds},
        "tables": tables, "verdicts": [v for kind in kinds for v in verdicts(kind, tables[kind])],
    }  # fmt: skip


def true_ode(mini: Mini, seed: int, count: int | None = None) -> Run:
    """The reference that solvers are measured against."""
    mini.schedule("ab2", 2.0)
    return mini.run(labels_of(mini.kind, seed, count), seed, TRUTH)


def _row(mini: Mini, name: str, run: Run, exact: Run, evaluations: int) -> Row:
    report = run.report
    per_step = exact.calls / STEPS
    return {
        "method": name, "calls": run.calls / per_step, "skipped": 1 - run.calls / exact.calls if evaluations == STEPS else 0.0,
        "cpu": exact.seconds / run.seconds, "held": report.bytes_held_peak if report else 0,
        "fp16": report.bytes_exact if report else 0, **compare(mini, run, exact),
    }  # fmt: skip


def _euler(mini: Mini, seed: int) -> list[Row]:
    labels = labels_of(mini.kind, seed)
    mini.schedule("euler", 1.0)
    configs = {name: preset(name, mini.family) for name in ("quality", "balanced", "fast")}
    go = lambda config=None, steps=STEPS: mini.run(labels, seed, steps, config)  # noqa: E731
    go(steps=2)  # warm caches are part of no figure
    repeats = [(go(), go(configs["balanced"])) for _ in range(3)]  # interleaved: the machine's mood hits both
    exact, balanced = repeats[0]
    exact.seconds = median(e.seconds for e, _ in repeats)
    balanced.seconds = median(b.seconds for _, b in repeats)
    calls = round(balanced.calls / exact.calls * STEPS)
    reuse = Config(scorer=None, strategy="delta", monitor=Fixed(interval=interval_for(calls)), codec="exact")
    line = Config(scorer=None, strategy="delta2", monitor=Fixed(interval=interval_for(calls)), codec="exact")
    whole = replace(configs["balanced"], codec="exact")
    return [
        _row(mini, "exact", exact, exact, STEPS),
        _row(mini, "tqai quality", go(configs["quality"]), exact, STEPS),
        _row(mini, "tqai balanced", balanced, exact, STEPS),
        _row(mini, "tqai balanced, uncoded", go(whole), exact, STEPS),
        _row(mini, "tqai fast", go(configs["fast"]), exact, STEPS),
        _row(mini, "plain reuse, same calls", go(reuse), exact, STEPS),
        _row(mini, "fixed schedule, order 1, same calls", go(line), exact, STEPS),
        _row(mini, "fewer Euler steps, same calls", go(steps=calls), exact, calls),
    ]


def _multistep(mini: Mini, seeds: Sequence[int], truth: dict[int, Run]) -> tuple[list[Row], dict[int, list[float]]]:
    rows: list[list[Row]] = []
    nodes: dict[int, list[float]] = {}
    config = preset("balanced", mini.family)
    for seed in seeds:
        labels, ode = labels_of(mini.kind, seed), truth[seed].latents
        out: list[Row] = []
        for name in multistep_of(mini.kind):
            mini.schedule(name, SHIFT)
            exact = mini.run(labels, seed, STEPS)
            skip = mini.run(labels, seed, STEPS, config)
            half = mini.run(labels, seed, STEPS // 2)
            for what, run, steps in (
                (f"{STEPS} steps", exact, STEPS),
                (f"{STEPS} steps, tqai", skip, STEPS),
                (f"{STEPS // 2} steps", half, 12),
            ):
                out.append(_row(mini, f"{name} shift {SHIFT:g}, {what}", run, exact, steps) | _to_ode(run, ode))
            if name == "unipc" and skip.report:
                nodes[seed] = [d["sigma"] for d in skip.report.decisions if d["action"] == "compute"]
        rows.append(out)
    return _over_seeds(rows), nodes


def _solvers(mini: Mini, seeds: Sequence[int], truth: dict[int, Run], nodes: dict[int, list[float]], multistep: list[Row]) -> list[Row]:
    """The honest baseline: as many calls as skipping took, on the grid that suits the solver best."""
    calls = round(next(r["calls"] for r in multistep if r["method"].startswith("unipc") and "tqai" in r["method"]))
    few = labels_of(mini.kind, CALIBRATION, 4)
    ideal = true_ode(mini, CALIBRATION, 4).latents
    best: dict[str, float] = {}
    for name in ("unipc", "ab2"):
        errors = {}
        for shift in SHIFTS:
            mini.schedule(name, shift)
            errors[shift] = nmse(mini.run(few, CALIBRATION, calls).latents, ideal)
        best[name] = min(errors, key=errors.__getitem__)
    rows: list[list[Row]] = []
    config = preset("balanced", mini.family)
    for seed in seeds:
        labels, ode = labels_of(mini.kind, seed), truth[seed].latents
        out: list[Row] = []

        def add(what: str, run: Run, out: list[Row] = out, ode: Any = ode, per: float = truth[seed].calls / TRUTH) -> None:
            out.append({"method": what, "calls": run.calls / per, **_to_ode(run, ode)})

        for name in ("unipc", "ab2"):
            mini.schedule(name, best[name])
            add(f"{name} shift {best[name]:g} (tuned), {calls} steps", mini.run(labels, seed, calls))
        mini.schedule("unipc", best["unipc"])
        add(f"unipc shift {best['unipc']:g}, {STEPS} steps, tqai", mini.run(labels, seed, STEPS, config))
        mini.schedule("unipc", SHIFT)
        add(f"unipc shift {SHIFT:g}, {STEPS} steps, tqai", mini.run(labels, seed, STEPS, config))
        mini.schedule("ab2", 1.0, nodes[seed])
        add("ab2 on the nodes that tqai computed", mini.run(labels, seed, len(nodes[seed])))
        mini.schedule("unipc", SHIFT)
        add(f"unipc shift {SHIFT:g}, {STEPS} steps, exact", mini.run(labels, seed, STEPS))
        rows.append(out)
    return _over_seeds(rows)


def _to_ode(run: Run, ode: Tensor) -> Row:
    return {"ode": nmse(run.latents, ode), "ode_each": each(nmse, run.latents, ode)}


def interval_for(calls: int, steps: int = STEPS) -> float:
    """The interval at which the ``fixed`` monitor computes ``calls`` of ``steps`` evaluations (or one more)."""
    for tenth in range(10, 200):
        monitor, state = Fixed(interval=tenth / 10), {}  # type: ignore[var-annotated]
        count = sum(monitor.decide(Step(i, 1 - i / steps, steps, i == steps - 1), None, 0, state).compute for i in range(steps))
        if count <= calls:
            return tenth / 10
    return 20.0


def _over_seeds(runs: list[list[Row]]) -> list[Row]:
    """Row by row, median over the seeds of every figure."""
    return [medians(rows) for rows in zip(*runs, strict=True)]


def verdicts(kind: str, tables: dict[str, list[Row]]) -> list[Row]:
    """What the project promises, beside what was measured."""
    row = {r["method"]: r for r in tables["euler"]}
    ours, reuse, fewer = row["tqai balanced"], row["plain reuse, same calls"], row["fewer Euler steps, same calls"]
    out: list[Row] = []
    need = promises(out, kind)
    need("calls skipped, Euler 24, balanced", ours["skipped"], least=0.45 if kind in UNTUNED else 0.48)
    need("latent PSNR, dB", ours["psnr"], least=FLOORS[kind])
    if kind == "wan":
        need("frame-label agreement", ours["agreement"], least=0.95)
    need("CPU-time ratio", ours["cpu"], least=1.9)
    need("NMSE / plain reuse at equal calls", ours["nmse"] / reuse["nmse"], most=1 / 3)
    need("NMSE / fewer Euler steps at equal calls", ours["nmse"] / fewer["nmse"], most=1 / 3)
    multi = {r["method"]: r for r in tables.get("multistep", ())}
    for name in multistep_of(kind) if multi else ():
        skip, half = (multi[f"{name} shift {SHIFT:g}, {what}"] for what in (f"{STEPS} steps, tqai", f"{STEPS // 2} steps"))
        need(f"{name}: calls", skip["calls"], most=STEPS / 2)
        need(f"{name}: own NMSE / half the steps", skip["nmse"] / half["nmse"], most=1 / 3)
        need(f"{name}: ODE error / half the steps", skip["ode"] / half["ode"], most=2 / 3)
    single = {r["method"]: r for r in tables["alone"]}
    for name in ("balanced", "quality"):
        worst, bar = single[alone.PRESET.format(name)]["psnr_worst"], single[alone.FEWER.format(name)]["psnr"]
        need(f"one at a time: minimum of {name} above the median of fewer steps at equal calls, dB", worst - bar, least=0)
    need("one at a time: calls skipped, balanced", single["tqai balanced"]["skipped"], least=0.45 if kind == "photo" else 0.48)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    """(title, head, rows) for a terminal or Markdown."""
    error = lambda r, key: [f"{r[name] * 1e4:.2f}" for name in (key, f"{key}_tail", f"{key}_worst")]  # noqa: E731
    for kind, tables in result["tables"].items():
        batch = f"batches of {result['samples'][kind]}, seeds {', '.join(map(str, result['seeds']))}"
        yield (
            f"{kind}: Euler, shift 1, 24 steps, guidance 2 (error against the exact run); {batch}: median over the seeds; 5 % and least, "
            "95 % and most are of single pictures",
            ["method", "calls", "skipped", "CPU ratio", *PSNR, *NMSE, "labels", "held B", "fp16 B"],
            [
                [
                    r["method"], f"{r['calls']:g}", f"{r['skipped']:.0%}", f"{r['cpu']:.2f}",
                    *("inf" if math.isinf(r[key]) else f"{r[key]:.1f}" for key in ("psnr", "psnr_tail", "psnr_worst")),
                    *error(r, "nmse"), f"{r['agreement']:.3f}", f"{r['held']:,.0f}", f"{r['fp16']:,.0f}",
                ]
                for r in tables["euler"]
            ],
        )  # fmt: skip
        yield alone.tables(kind, tables["alone"], result["alone"][kind])
        if "multistep" not in tables:
            continue
        yield (
            f"{kind}: multistep schedulers (own: against their 24 steps; ODE: against {TRUTH} calls); {batch}",
            ["method", "calls", "own " + NMSE[0], *NMSE[1:], "ODE " + NMSE[0], *NMSE[1:], "labels"],
            [[r["method"], f"{r['calls']:g}", *error(r, "nmse"), *error(r, "ode"), f"{r['agreement']:.3f}"] for r in tables["multistep"]],
        )
        yield (
            f"{kind}: at equal calls against the true ODE: parity is what skipping can promise here; {batch}",
            ["method", "calls", "ODE " + NMSE[0], *NMSE[1:]],
            [[r["method"], f"{r['calls']:g}", *error(r, "ode")] for r in tables["solvers"]],
        )
    yield from closing(result)
