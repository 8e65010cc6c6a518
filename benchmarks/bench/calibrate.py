"""``tqai bench calibrate``: what calibration and tuning are worth on the minis, on seeds that they never saw."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from tqai_core.calibrate import policy
from tqai_core.calibrate.file import Calibration
from tqai_core.calibrate.run import calibrate
from tqai_core.calibrate.tune import Budget, tune
from tqai_core.codecs.bases import hadamard
from tqai_core.hosts import calibration_targets as targets
from tqai_core.hosts.attention_interceptor import intercept_attention
from tqai_core.hosts.calibration_targets import CalibrationTarget, Diffusion, Language
from tqai_core.registry import build

from .harness import Row, Table, child, closing, machine, one_thread, promises

SEEDS = (0, 1)  # of the reported figures
LM_SEEDS = (0, 1, 2, 3)
TRIALS = 40
PEAK = """
import torch
from tqai_core.hosts import calibration_targets as targets
from tqai_core.calibrate.basis import Moments
from tqai_core.calibrate.file import WIDTHS
from tqai_core.calibrate.fisher import Sums, probe
from tqai_core.peak import status
from tqai_core.registry import build
kind = sys.argv[1]
target = targets.demo(kind)
weights = sum(p.numel() * p.element_size() for p in target.model.parameters())
found = {"infer": None, "fisher": None}
before = 0
def peak():
    high = max(status("VmHWM:") - before, 0) + weights
    open("/proc/self/clear_refs", "w").write("5")
    return high
def measure():
    target.final(100)
    found["infer"] = peak()
    moments = Moments()
    calls = target.record(100, moments.see)
    sums = Sums(len(moments.layers), len(moments.sums["0/mean"]), len(target.sigmas))
    codecs = {bits: build("codec", f"turbo:bits={bits}") for bits in WIDTHS}
    for band, call in calls:
        probe(target, band, call, sums, codecs, torch.Generator().manual_seed(0))
    found["fisher"] = peak()
try:
    before = status("VmRSS:")
    peak()
    measure()
except OSError:
    pass
"""


def held_out(kind: str) -> CalibrationTarget:
    """The mini on data that calibration never reads: other seeds, for language the other half of the text."""
    if kind != "lm":
        return targets.demo(kind)
    from tqai_core import minis

    return Language(minis.lm(), targets.Windows(minis.lm_text()[2**16 :], 4))


def bench(kinds: Sequence[str], tell: Callable[[str], None] = lambda text: None, trials: int = TRIALS) -> Row:
    """Everything, as plain data."""
    tables: Row = {}
    for kind in kinds:
        tables[kind] = calibrated(kind, tell)
        if kind != "lm":
            tables[kind]["tune"] = tuned(kind, tell, trials)
    return result_of(tables, trials)


def result_of(tables: Row, trials: int = TRIALS) -> Row:
    result: Row = {"bench": "calibrate", "machine": machine(), "seeds": list(SEEDS), "trials": trials, "tables": tables}
    result["verdicts"] = verdicts(result)
    return result


def calibrated(kind: str, tell: Callable[[str], None] = lambda text: None) -> Row:
    """One mini calibrated, and every table judged on data that calibration never read."""
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        tell(f"{kind}: calibration")
        began = time.process_time()
        made = calibrate(targets.demo(kind), Path(folder) / f"{kind}.safetensors")
        table: Row = {"seconds_cpu": time.process_time() - began, "samples": made.header["samples"]}
    target = held_out(kind)
    target.sigmas = tuple(made.tensors["sigmas"].tolist())
    tell(f"{kind}: true damage of every unit")
    table["rank"] = rank(target, made, LM_SEEDS if kind == "lm" else SEEDS[:1])
    tell(f"{kind}: bases")
    table["bases"] = bases(target, made, SEEDS[0])
    tell(f"{kind}: bits")
    table["bits"] = bits(target, made, SEEDS)
    tell(f"{kind}: memory")
    return table | {"peak": peak(kind)}


def tuned(kind: str, tell: Callable[[str], None] = lambda text: None, trials: int = TRIALS) -> Row:
    """A search at half the calls, and its proof on seeds it never saw."""
    one_thread()
    tell(f"{kind}: tuning, {trials} trials")
    target = targets.demo(kind)
    assert isinstance(target, Diffusion)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        found = tune(target, Budget("calls", 0.5), Path(folder) / "study.db", trials)
        spent = time.process_time() - began
    return {
        "seconds_cpu": spent,
        "trials": len(found["trials"]),
        **{k: found[k] for k in ("proof", "kept", "config", "layers", "skip_layers")},
    }


@torch.no_grad()
def rank(target: CalibrationTarget, made: Calibration, seeds: Sequence[int]) -> Row:
    """Spearman of predictions with the true damage of units at 2 bits: each is coded alone and the model run."""
    from scipy.stats import spearmanr

    fisher, error, damage = (made.tensors[name] for name in ("fisher", "error", "damage"))
    true = torch.zeros_like(fisher)
    codec = build("codec", f"{made.header['codec']}:bits=2")
    for band, call in itertools.chain.from_iterable(target.record(seed) for seed in seeds):
        exact = call()
        for layer, head, which in itertools.product(*map(range, true.shape[:3])):

            def change(at: int, q: Tensor, k: Tensor, v: Tensor, unit: tuple[int, int, int] = (layer, head, which)) -> Any:
                if at != unit[0]:
                    return k, v
                kv = [k, v]
                x = kv[unit[2]] = kv[unit[2]].clone()
                own = x[:, unit[1]].contiguous()
                x[:, unit[1]] = codec.decode(codec.encode(own), x.dtype)
                return kv[0], kv[1]

            with intercept_attention(target.model, change):
                true[layer, head, which, band] += target.damage(call(), exact)
    how = lambda x: float(spearmanr(x.flatten().numpy(), true.flatten().numpy())[0])  # noqa: E731
    return {
        "units": true.numel(), "fisher x error": how(fisher * error[..., 1]), "damage at 2 bits": how(damage[..., 1]),
        "fisher alone": how(fisher), "error alone": how(error[..., 1]),
        "value / key damage": float(true[:, :, 1].sum() / true[:, :, 0].sum()),
    }  # fmt: skip


def bases(target: CalibrationTarget, made: Calibration, seed: int) -> Row:
    """NMSE of keys and values of a run, coded by trellis with the calibrated bases and with the rotation; bits held."""
    bits = made.bases.bits
    codec = build("codec", f"trellis:bits={bits}")
    found: dict[str, list[float]] = {"klt": [], "hadamard": []}
    held: dict[str, list[float]] = {"klt": [], "hadamard": []}
    seen = {"n": 0}

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen["n"] += 1
        if (seen["n"] // len(made.bases.streams)) % 4 == 0:
            for kind, x in (("k", k), ("v", v)):
                d = x.shape[-1]
                for what, own in (
                    ("klt", made.bases.of(f"{layer}/{kind}", d, x.shape[1], bits, codec.seed)), ("hadamard", hadamard(d, bits, codec.seed)),
                ):  # fmt: skip
                    packed = codec.encode(x, bases=own)
                    gap = (x - codec.decode(packed, torch.float32, bases=own)).square().sum(-1) / x.square().sum(-1).clamp_min(1e-30)
                    found[what].append(float(gap.mean()))
                    held[what].append(packed.nbytes * 8 / x.numel())
        return k, v

    target.final(seed, watch)
    kept = [v["kept"] for heads in made.header["verdicts"]["bases"].values() for v in heads]
    return {
        **{what: mean(values) for what, values in found.items()}, **{f"{what} bits": mean(values) for what, values in held.items()},
        "kept": kept.count("klt"), "of": len(kept),
    }  # fmt: skip


def bits(target: CalibrationTarget, made: Calibration, seeds: Sequence[int]) -> Row:
    """Loss of the end result with the file's bits and with uniform ones."""
    verdict = made.header["verdicts"]["bits"]
    exact: dict[int, Tensor] = {}
    average = verdict["average"]
    uniform = torch.full_like(made.tensors["bits"], average)
    plain = policy.trial(target, uniform, made.header["codec"], seeds, exact)
    ours = policy.trial(target, made.tensors["bits"], made.header["codec"], seeds, exact) if verdict["kept"] == "fisher" else plain
    return {"kept": verdict["kept"], "how": verdict["how"], "key_bits": verdict["key_bits"], "value_bits": verdict["value_bits"],
            "ours": ours, "uniform": plain, "choice": verdict["fisher"]["loss"] / verdict["uniform"]["loss"]}  # fmt: skip


def peak(kind: str) -> dict[str, int | None]:
    """Bytes that a run needs (``infer``), and a seed of calibration (``fisher``): the run, its moments and all probes. Weights
    included, what importing takes left out; in a process of its own. None where the system does not tell."""
    return {key: value for key, value in child(PEAK, kind).items() if key != "stderr"}


def verdicts(result: Row) -> list[Row]:
    """What the issue asks, beside what was measured."""
    out: list[Row] = []
    tables = result["tables"]
    for kind, t in tables.items():
        need = promises(out, kind)
        need("Spearman of Fisher x error with the true damage of 2-bit units", t["rank"]["fisher x error"], least=0.85)
        need("calibration, CPU seconds", t["seconds_cpu"], most=60)
        ratio = t["peak"]["fisher"] / t["peak"]["infer"] if t["peak"]["infer"] and t["peak"]["fisher"] else None
        need("peak memory / that of inference", ratio, most=3)
        need("NMSE of the rotation / of KLT bases, held-out keys and values", t["bases"]["hadamard"] / t["bases"]["klt"], least=2)
        gain = t["bits"]["uniform"]["loss"] / t["bits"]["ours"]["loss"]
        if t["bits"]["kept"] == "fisher":
            need("loss of uniform 3 bits / of Fisher bits, kept", gain, least=1.5)
            need("bits of keys - bits of values", t["bits"]["key_bits"] - t["bits"]["value_bits"], least=0.01)
        else:
            need("loss of uniform 3 bits / of what the file says (uniform kept)", gain, least=1)
    tuned = {kind: t["tune"]["proof"] for kind, t in tables.items() if "tune" in t}
    ratios = {}
    for kind, proof in tuned.items():
        ratios[kind] = proof["tuned"]["error"] / proof["default"]["error"] if tables[kind]["tune"]["kept"] == "tuned" else 1.0
        need = promises(out, kind)
        need("tuned at 50 % of the calls: error / default preset's, unseen seeds", ratios[kind], most=1)
        need("tuned: share of calls", proof["tuned"]["calls"], most=0.5)
    if len(ratios) == 3:
        promises(out, "all")("second best of these three", sorted(ratios.values())[1], most=0.7)
    if "flux" in tuned:
        promises(out, "flux")(f"CPU seconds of {tables['flux']['tune']['trials']} trials", tables["flux"]["tune"]["seconds_cpu"], most=300)
    return out


def tables_of(result: Row) -> list[Table]:
    """(title, head, rows) of every table."""
    return [
        ("Fisher and bases", *calibration(result)), ("bits at 3 on average", *allocation(result)),
        ("tuning at half the calls", *tuning(result)), *closing(result),
    ]  # fmt: skip


def calibration(result: Row) -> tuple[list[str], list[list[str]]]:
    head = ["mini", "CPU s", "peak / inference", "rank of 2-bit damage", "error alone", "KLT NMSE", "rotation NMSE", "bits held"]
    rows = []
    for kind, t in result["tables"].items():
        peak = t["peak"]["fisher"] / t["peak"]["infer"] if t["peak"]["infer"] and t["peak"]["fisher"] else math.nan
        rows.append([
            kind, f"{t['seconds_cpu']:.0f}", f"{peak:.2f}", f"{t['rank']['fisher x error']:.2f}", f"{t['rank']['error alone']:.2f}",
            f"{t['bases']['klt']:.6f}", f"{t['bases']['hadamard']:.6f}", f"{t['bases']['klt bits']:.3f}",
        ])  # fmt: skip
    return head, rows


def allocation(result: Row) -> tuple[list[str], list[list[str]]]:
    rows = []
    for kind, t in result["tables"].items():
        b = t["bits"]
        rows.append([
            kind, b["kept"], f"{b['key_bits']:.2f} / {b['value_bits']:.2f}", f"{b['choice']:.2f}",
            f"{b['ours']['loss'] / b['uniform']['loss']:.2f}", f"{b['ours']['bytes']:,} / {b['uniform']['bytes']:,}",
        ])  # fmt: skip
    return ["mini", "written", "bits of keys / values found", "loss / uniform, verdict", "loss / uniform, unseen", "bytes / uniform"], rows


def tuning(result: Row) -> tuple[list[str], list[list[str]]]:
    rows = []
    for kind, t in result["tables"].items():
        for name, row in t.get("tune", {}).get("proof", {}).items():
            label = "default preset" if name == "default" else f"tuned, {t['tune']['trials']} trials ({t['tune']['seconds_cpu']:.0f} CPU s)"
            rows.append([kind, label, f"{row['calls']:.0%}", f"{row['error'] * 1e4:.2f}", f"{row['bytes']:,.0f}", f"{row['time']:.2f}"])
    return ["mini", "pipeline", "calls", "NMSE e-4, unseen seeds", "bytes held", "time / exact"], rows
