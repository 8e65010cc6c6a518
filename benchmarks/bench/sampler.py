"""``tqai bench sampler``: the calibrated sampler against stock solvers at equal calls, on the three minis.

Samplers are calibrated on labels 0 to 4; they are tried on seeds they have not seen and all
labels. The true ODE is Adams-Bashforth 2 with 240 calls at shift 2, as in ``tqai bench dit``. Stock solvers take the shift that
is best for them on the calibration seeds.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tqai_core.calibrate.multistep import grid
from tqai_core.calibrate.sampler import STOCK, CalibratedSampler, Reference, calibrate, extend_guidance_range, reference
from tqai_core.calibrate.sampler_cli import FIRST, FIRST_HELD_OUT
from tqai_core.errors import TqaiError
from tqai_core.metrics import nmse

from .harness import Row, Table, child, closing, machine, one_thread, promises

CALLS = (12, 10)
SHIFTS = (0.7, 1.0, 1.5, 2.0, 3.0)
SAMPLES = {"flux": 10, "sd3": 10, "wan": 3}
TRUTH, TRUTH_OTHER = 240, 120  # calls; the second where another guidance is tried
FIT, HELD_OUT = 4, 3  # seeds; the former choose the stock solvers' shifts, too
GUIDANCE, OTHER, OTHER_SEEDS = 2.0, 4.0, 2

PEAK = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10"  # MiB, the whole process
CALIBRATE = f"""
import resource, time
from tqai_core.hosts.diffusers import minis, sampler
from tqai_core.cli import main
began = time.process_time()
status = main(sys.argv[1:])
found = {{"status": status, "seconds_cpu": time.process_time() - began, "peak": {PEAK}}}
"""
INFER = f"""
import resource
from tqai_core.hosts.diffusers import minis
pipe = minis.pipeline(sys.argv[1])
inputs = minis.inputs(sys.argv[1], [i % 5 for i in range(int(sys.argv[2]))], 2.0)
loaded = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
pipe(**inputs, num_inference_steps=12, output_type="latent")
found = {{"loaded": loaded, "peak": {PEAK}}}
"""


@dataclass
class Case:
    """One mini with its calibration batch and its test batches."""

    kind: str
    model: Any
    seeds: list[int]  # of samples; a test seed has SAMPLES of them
    samples: int

    def label(self, seed: int) -> int:
        """Calibration and held-out seeds have labels 0 to 4, test seeds all ten."""
        return seed % 5 if seed >= FIRST else (seed % 100 + 3 * (seed // 100)) % 10


def case_of(kind: str, seeds: Sequence[int]) -> Case:
    from tqai_core.hosts.diffusers import minis
    from tqai_core.hosts.diffusers.sampler import PipelineModel

    samples = SAMPLES[kind]
    if any(seed >= FIRST // 100 for seed in seeds):
        raise TqaiError(f"seeds {list(seeds)}: calibration uses {FIRST // 100} and higher, give smaller ones")
    case = Case(kind, None, [100 * seed + i for seed in seeds for i in range(samples)], samples)
    pipe = minis.pipeline(kind)
    case.model = PipelineModel(pipe, lambda some: minis.inputs(kind, [case.label(s) for s in some], GUIDANCE), batch=max(samples, FIT))
    return case


def bench(kinds: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data."""
    one_thread()
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            tables[kind] = _mini(kind, seeds, Path(folder), tell)
    return {
        "bench": "sampler", "machine": machine(), "seeds": list(seeds), "samples": SAMPLES, "guidance": GUIDANCE, "tables": tables,
        "verdicts": [v for kind in kinds for v in verdicts(kind, tables[kind])],
    }  # fmt: skip


def _mini(kind: str, seeds: Sequence[int], folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    case = case_of(kind, seeds)
    tell(f"{kind}: files")
    made = _files(case, folder)
    inference = _child(INFER, kind, str(FIT))
    tell(f"{kind}: true ODE, {TRUTH} calls on {len(case.seeds)} samples")
    exact = reference(case.model, case.seeds, TRUTH)
    tell(f"{kind}: stock solvers, their best shift on the calibration seeds")
    tuned = _tuned(case)
    rows = []
    for calls in (*CALLS, 8) if kind == "wan" else CALLS:
        tell(f"{kind}: {calls} calls")
        for name in STOCK:
            shift = tuned[f"{name} {max(calls, min(CALLS))}"]
            rows.append({"method": f"{name}, tuned shift {shift:g}", "calls": calls, **_stock(case, exact, name, shift, calls)})
        for what, entry in made.items():
            if entry["file"] is not None and math.floor(entry["calls"]) == calls:
                rows.append({"method": f"calibrated, {what}", "calls": entry["calls"], **_ours(case, exact, entry["file"])})
    nodes = CalibratedSampler.load(made["12 steps"]["file"]).nodes
    rows.append({"method": "ab2 on the calibrated nodes", "calls": 12, **_nodes(case, exact, (*nodes, 0.0))})
    rows.append({"method": "unipc, shift 3, 24 steps", "calls": 24, **_stock(case, exact, "unipc", 3.0, 24)})
    tell(f"{kind}: guidance {OTHER:g}")
    other = _other(case, made["12 steps"]["file"], tuned)
    for entry in made.values():
        entry["file"] = None if entry["file"] is None else json.loads(Path(entry["file"]).read_text())
    return {"rows": rows, "files": made, "inference": inference, "other": other, "tuned": tuned}


def _files(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """The 12-step file by the command in a process of its own, which is timed; the others by what it calls, on the same seeds."""
    made = {"12 steps": _file(case.kind, folder / f"{case.kind}.json", "--steps", "12", "--samples", str(FIT), "--held-out", str(HELD_OUT))}
    if made["12 steps"]["file"] is None:
        raise RuntimeError(f"no 12-step file for {case.kind}: {made['12 steps']['said']}")
    fit, held_out = [FIRST + i for i in range(FIT)], [FIRST_HELD_OUT + i for i in range(HELD_OUT)]
    references = reference(case.model, fit), reference(case.model, held_out)
    more: dict[str, dict[str, Any]] = {
        "10 steps": {"steps": 10}, "12 steps, last step only": {"steps": 12, "form": "last"}, "15 steps, difference": {"steps": 15},
    }  # fmt: skip
    if case.kind == "wan":
        more["8 steps"] = {"steps": 8}
    for what, options in more.items():
        path = folder / f"{case.kind} {what}.json"
        case.model.difference = "difference" in what
        try:
            sampler = calibrate(case.model, **options, seeds=fit, held_out=held_out, references=references)
            sampler.save(path)
            made[what] = {"said": "", "file": str(path), "calls": sampler.calls}
        except ValueError as error:
            made[what] = {"said": str(error), "file": None}
        case.model.difference = False
    return made


def _file(kind: str, path: Path, *options: str) -> dict[str, Any]:
    """What ``tqai calibrate --sampler`` says and costs; ``file`` is None where it refuses."""
    cost = _child(CALIBRATE, "calibrate", "--sampler", "--demo", kind, "-o", str(path), *options)
    return {**cost, "calls": 12, "file": str(path) if path.exists() else None}


def _child(work: str, *arguments: str) -> Row:
    """CPU seconds and peak memory (MiB, the whole process) of work in a process of its own, and its refusal."""
    found = child(work, *arguments)
    said = [line for line in found.pop("stderr").splitlines() if line.startswith("tqai:")]
    return {**found, "said": said[-1] if said else ""}


def _tuned(case: Case) -> dict[str, float]:
    seeds = [FIRST + i for i in range(FIT)]
    exact = reference(case.model, seeds)
    best = {}
    for calls in CALLS:
        for name in STOCK:
            found = {shift: _stock(case, exact, name, shift, calls, seeds)["ode"] for shift in SHIFTS}
            best[f"{name} {calls}"] = min(found, key=found.__getitem__)
    return best


def _figures(case: Case, exact: Reference, end: Tensor, before: Tensor, sigma: float, seeds: Sequence[int]) -> Row:
    """Errors to the true ODE: median and range over test seeds, on labels 5 to 9 alone, and before the last step."""
    ode, at = exact.end, exact.at(sigma)
    size = min(case.samples, len(seeds))
    parts = [nmse(a, b) for a, b in zip(end.split(size), ode.split(size), strict=True)]
    fresh = torch.tensor([case.label(seed) > 4 for seed in seeds])
    unseen = nmse(end[fresh], ode[fresh]) if bool(fresh.any()) else None
    return {
        "ode": median(parts), "mean": sum(parts) / len(parts), "low": min(parts), "high": max(parts), "unseen": unseen,
        "before_last": nmse(before, at),
    }  # fmt: skip


def _walk(case: Case, exact: Reference, runs: list[tuple[float, Tensor, Tensor]], seeds: Sequence[int]) -> Row:
    return _figures(case, exact, torch.cat([r[2] for r in runs]), torch.cat([r[1] for r in runs]), runs[0][0], seeds)


def _stock(case: Case, exact: Reference, name: str, shift: float, steps: int, seeds: Sequence[int] | None = None) -> Row:
    seeds = seeds or case.seeds
    if name == "ab2":
        return _nodes(case, exact, grid(steps, shift), seeds)
    return _walk(case, exact, case.model.stock(name, shift, steps, seeds), seeds)


def _nodes(case: Case, exact: Reference, nodes: Sequence[float], seeds: Sequence[int] | None = None, theta: Any = None) -> Row:
    """Adams-Bashforth 2 on these nodes, with fitted terms where ``theta`` has them."""
    from tqai_core.calibrate.multistep import Multistep
    from tqai_core.hosts.diffusers.sampler import SolverScheduler

    seeds = seeds or case.seeds
    make = lambda: SolverScheduler.of(Multistep(nodes, theta), lambda: None, lambda pipe, names: None)  # noqa: E731
    return _walk(case, exact, case.model.run_scheduler(make, len(nodes) - 1, seeds), seeds)


def _ours(case: Case, exact: Reference, file: str) -> Row:
    """Through the door that users take."""
    import tqai_core as tqai

    sampler = CalibratedSampler.load(file)
    handle = tqai.apply(case.model.pipe, tqai.Config.from_json(sampler.difference)) if sampler.difference else None
    try:
        return _walk(
            case, exact, case.model.run_scheduler(lambda: tqai.CalibratedScheduler.from_file(file), sampler.steps, case.seeds), case.seeds
        )
    finally:
        if handle is not None:
            handle.remove()


def _other(case: Case, file: str, tuned: dict[str, float]) -> dict[str, Any]:
    """Guidance 4 with a file made at 2: refused, or how it does beside stock solvers there."""
    path, seeds = Path(file).with_suffix(".wide.json"), case.seeds[: OTHER_SEEDS * case.samples]
    sampler = extend_guidance_range(case.model, CalibratedSampler.load(file), OTHER)
    sampler.save(path)
    with case.model.guided(OTHER):
        exact = reference(case.model, seeds, TRUTH_OTHER)
        found = {name: _stock(case, exact, name, tuned[f"{name} 12"], 12, seeds) for name in STOCK}
        ours = _nodes(case, exact, (*sampler.nodes, 0.0), seeds, sampler.theta)
        try:
            sampler.check(guidance=OTHER)
            refused = None
        except ValueError as error:
            refused = str(error)
        return {"refused": refused, "proved": sampler.guidance["proved"], "rows": {"calibrated": ours, **found}}


def verdicts(kind: str, table: Row) -> list[Row]:
    """What the issue asks of these figures."""
    rows: list[Row] = table["rows"]
    out: list[Row] = []
    need = promises(out, kind)

    def best(calls: int, key: str) -> float:
        return min(float(r[key]) for r in rows if r["calls"] == calls and "tuned" in r["method"])

    ours = {r["method"]: r for r in rows if r["method"].startswith("calibrated")}
    for calls in CALLS:
        row = ours.get(f"calibrated, {calls} steps", {"ode": float("inf"), "unseen": float("inf")})
        need(f"{calls} calls: best tuned stock solver / calibrated, error to the true ODE", best(calls, "ode") / row["ode"], least=2.0)
        need(f"{calls} calls: the same on labels 5 to 9", best(calls, "unseen") / row["unseen"], least=2.0)
    double = next(r for r in rows if r["calls"] == 24)
    twelve = ours.get("calibrated, 12 steps", {"ode": float("inf")})
    need("12 calibrated calls / 24 of UniPC at shift 3", twelve["ode"] / double["ode"], most=1.0)
    other = table["other"]
    if other["refused"]:
        need("guidance 4 from a file made at 2: refused", 1.0, least=1.0)
    else:
        least = min(other["rows"][name]["ode"] for name in STOCK)
        need("guidance 4 from a file made at 2 / best stock solver there", other["rows"]["calibrated"]["ode"] / least, most=1.0)
    if kind == "wan":
        eight = table["files"]["8 steps"]
        if eight["file"] is None:
            need("8 calls lose on held-out seeds: no file", float(eight["said"].startswith("no file was made")), least=1.0)
        else:
            need("8 calls, file written: calibrated / best stock", ours["calibrated, 8 steps"]["ode"] / best(8, "ode"), most=1.0)
    made, inference = table["files"]["12 steps"], table["inference"]
    need("CPU seconds of a calibration", made["seconds_cpu"], most=60.0)
    need("peak memory of calibrating / of inference, whole process", made["peak"] / inference["peak"], most=3.0)
    grown = [r["peak"] - inference["loaded"] for r in (made, inference)]
    need("the same above the loaded model", grown[0] / grown[1], most=3.0)
    return out


def tables_of(result: Row) -> list[Table]:
    """Every table, the verdicts last."""
    out: list[Table] = []
    for kind, table in result["tables"].items():
        out.append((f"{kind}: error to the true ODE at equal calls, guidance {result['guidance']:g}", *rows_of(table["rows"])))
        other = table["other"]
        body = [[name, f"{r['ode'] * 1e4:.2f}"] for name, r in other["rows"].items()]
        state = "refused" if other["refused"] else "allowed"
        out.append((f"{kind}: guidance {OTHER:g}, a file made at {GUIDANCE:g} ({state})", ["12 calls", "NMSE e-4"], body))
        made = [
            [
                w,
                f"{f['seconds_cpu']:.0f}" if "peak" in f else "",
                f"{f['peak']:.0f}" if "peak" in f else "",
                f["said"][:90] or f["file"]["grid"],
            ]
            for w, f in table["files"].items()
        ]
        made.append(["inference, 12 steps", "", f"{table['inference']['peak']:.0f}", f"{table['inference']['loaded']:.0f} MiB before it"])
        out.append((f"{kind}: calibration", ["file", "CPU s", "peak MiB", "grid, or refusal"], made))
    return [*out, *closing(result)]


def rows_of(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    e4 = lambda v: "" if v is None else f"{v * 1e4:.2f}"  # noqa: E731
    head = ["sampler", "calls", "true ODE, NMSE e-4", "mean", "over seeds", "labels 5-9", "before last"]
    out = []
    for r in rows:
        figures = [e4(r["ode"]), e4(r["mean"]), f"{e4(r['low'])} to {e4(r['high'])}", e4(r["unseen"]), e4(r["before_last"])]
        out.append([r["method"], f"{r['calls']:g}", *figures])
    return head, out
