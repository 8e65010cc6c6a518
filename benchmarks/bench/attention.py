"""What sparse attention pays: time and memory of one attention against the best dense one, and the error of whole generations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tqai_core.attention import block_attention, dense
from tqai_core.attention.far_field import FAR
from tqai_core.attention.token_order import TileOrder
from tqai_core.config import Config
from tqai_core.metrics import nmse
from tqai_core.peak import PROC, Peak
from tqai_core.registry import build
from tqai_core.strategies.window import Window

from . import sol
from .dit import labels_of
from .harness import Mini, Row, Table, closing, machine, one_thread, promises
from .plot import Chart

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = {  # tokens: heads
    "bf16": (128, {1024: 8, 2048: 4, 4096: 4, 8192: 4, 16384: 2}),
    "fp32": (64, {1024: 8, 2048: 4, 4096: 4, 8192: 4, 16384: 2}),
}
DENSITIES = (0.1, 0.25, 0.5)
BF16, FP32 = {0.1: 7, 0.25: 3, 0.5: 1.6}, {0.1: 7, 0.25: 2.8, 0.5: 1.5}  # asked for
ORDERS = (1, 0), (1, 1), (0, 0)  # of the residual: without and with the far field
MEANS = 8  # tokens that share a query
STEPS, SAMPLES = 24, 4
E2E = {
    f"{what}, order {order}, {'no' if far == 'none' else far} far field": (f"window:far={far},residual={order}", scorer, "interval=4")
    for what, scorer in (("top 25 %, frozen", "bsa"), ("window 25 %", None))
    for order in (1, 0)
    for far in ("none", "linear", "centroid", "clusters")
} | {
    "control: no attention at every 2nd step, order 1": ("delta2", None, "interval=2"),
    "control: the same after two more full steps": ("delta2", None, "interval=2,warmup=5"),
    "means of 12 queries at every 2nd step, order 1": ("window:queries=12", None, "interval=2"),
    "means of 48 queries at every 2nd step, order 1": ("window:queries=48", None, "interval=2"),
}


def bench(seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data."""
    one_thread()
    rows: list[Row] = []
    for kind, (d, sizes) in SIZES.items():
        for n, heads in sizes.items():
            tell(f"{kind}: {n} tokens")
            rows += speed(kind, n, heads, d)
    tell("memory at 8192 tokens")
    memory = [
        {
            "dtype": "bf16",
            "n": 8192,
            "d": 128,
            "density": density,
            "far": far or "none",
            "extra": extra_memory(8192, 128, "bf16", density, far),
        }
        for density in DENSITIES
        for far in (None, *FAR)
    ]
    result = {
        "bench": "attention", "machine": machine() | {"amx": amx()}, "seeds": list(seeds), "steps": STEPS, "samples": SAMPLES,
        "speed": rows, "memory": memory, "wan": generations(seeds, tell), "queries": queries(seeds[:1]), "sol": sol.rows(tell),
    }  # fmt: skip
    if not result["sol"]:
        result["missing"] = {"sol_attn": sol.MISSING}
    return result | {"verdicts": verdicts(result)}


def amx() -> bool:
    """Whether this CPU has matrix units for bf16, with which both dense and sparse attention are other ones."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def inputs(kind: str, n: int, heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, heads, n, d, generator=generator).to(TYPES[kind]) for _ in range(3))  # type: ignore[return-value]


def chosen(q: Tensor, k: Tensor, density: float) -> Tensor:
    """The top blocks, as scorer ``bsa`` finds them: 256 queries, 64 keys."""
    mass = build("scorer", "bsa").mass(q, k, 256, 64)
    return mass.topk(max(round(density * mass.shape[-1]), 1), -1).indices.sort(-1).values


def speed(kind: str, n: int, heads: int, d: int) -> list[Row]:
    """Seconds of CPU, medians of rounds in which all methods take turns."""
    q, k, v = inputs(kind, n, heads, d)
    runs: dict[tuple[str, float, str], Callable[[], Any]] = {
        ("sdpa", 1.0, "none"): lambda: F.scaled_dot_product_attention(q, k, v),
        ("products", 1.0, "none"): lambda: dense.products(q, k, v),
        ("autotuned", 1.0, "none"): lambda: dense.attention(q, k, v),
        (f"means of {MEANS} queries", 1 / MEANS, "none"): lambda: dense.attention(q.unflatten(2, (-1, MEANS)).mean(3), k, v),
    }
    for density in DENSITIES:
        index = chosen(q, k, density)
        for far in (None, *FAR) if density == 0.25 else (None,):
            runs["sparse", density, far or "none"] = partial(block_attention, q, k, v, index, far=far)
        runs["choosing the blocks", density, "none"] = partial(chosen, q, k, density)
    for run in runs.values():
        run()
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(5 if n <= 4096 else 3):
        for key, run in runs.items():
            began = time.process_time()
            run()
            times[key].append(time.process_time() - began)
    seconds = {key: median(found) for key, found in times.items()}
    fused = seconds["sdpa", 1.0, "none"]
    best = min(fused, seconds["products", 1.0, "none"])
    return [
        {
            "dtype": kind, "n": n, "d": d, "heads": heads, "method": method, "density": density, "far": far,
            "seconds": took, "over_sdpa": fused / took, "over_best": best / took,
        }
        for (method, density, far), took in seconds.items()
    ]  # fmt: skip


def extra_memory(n: int, d: int, kind: str, density: float, far: str | None, heads: int = 4) -> float | None:
    """Bytes of the process at its peak during one sparse attention, above those before it and its output; a second call, since
    the first one compiles kernels. None off Linux."""
    q, k, v = inputs(kind, n, heads, d)
    index = chosen(q, k, density)
    block_attention(q, k, v, index, far=far)
    with Peak(q.device) as peak:
        out = block_attention(q, k, v, index, far=far)
    return None if peak.nbytes is None or peak.how != PROC else max(peak.nbytes - out.nbytes, 0)


def generations(seeds: Sequence[int], tell: Callable[[str], None]) -> list[Row]:
    """Whole WAN clips: error against the exact run of the seed, and the part of the core attention that was computed."""
    mini = Mini("wan")
    mini.schedule("euler", 1.0)
    rows: dict[str, Row] = {}
    for seed in seeds:
        tell(f"wan: seed {seed}")
        labels = labels_of("wan", seed, SAMPLES)
        exact = mini.run(labels, seed, STEPS)
        for name, (strategy, scorer, when) in E2E.items():
            row = rows.setdefault(name, {"method": name, "nmse": [], "core": 1.0, "far_off": 0})
            config = Config(level="attention", strategy=strategy, scorer=scorer, monitor=f"fixed:{when}", codec="exact")
            run = mini.run(labels, seed, STEPS, config)
            assert run.report is not None
            skipped = run.report.calls_skipped / run.report.calls
            row["nmse"].append(nmse(run.latents, exact.latents))
            row["core"] = 1 - skipped * (1 - _density(build("strategy", strategy)))
            row["far_off"] += sum(site.get("far", 0.0) > 1 for site in run.report.per_site.values())
    return list(rows.values())


def _density(strategy: Any) -> float:
    """The part of the core attention that a sparse step of the WAN mini computes, its 576 tokens in blocks of 16."""
    if not isinstance(strategy, Window):
        return 0.0
    return 1 / strategy.queries if strategy.queries else round(strategy.density * 36) / 36


def queries(seeds: Sequence[int]) -> list[Row]:
    """Q sparsity on captured attention of the WAN mini: error of one step's output when the tile's mean query says all, and when it
    only carries the change since the last step, beside plain reuse. Means over layers and the middle steps."""
    mini = Mini("wan")
    mini.schedule("euler", 1.0)
    rows: dict[str, list[float]] = {}
    for seed in seeds:
        with Capture() as seen:
            mini.run(labels_of("wan", seed, 2), seed, STEPS)
        each = len(seen.found) // STEPS
        steps = [seen.found[i * each : (i + 1) * each] for i in range(STEPS)]
        for before, now in itertools.pairwise(steps[5:-1]):
            for (q0, k0, v0), (q, k, v) in zip(before, now, strict=True):
                old, true = F.scaled_dot_product_attention(q0, k0, v0), F.scaled_dot_product_attention(q, k, v)
                rows.setdefault("reuse of the last output", []).append(nmse(old, true))
                for tile in (4, 12, 48):
                    strategy, layout = Window(queries=tile), TileOrder.of(q.shape[2], tile, (9, 8, 8))
                    then, here = (layout.undo(strategy.means(layout.apply(a, 2), b, c, layout), 2) for a, b, c in ((q0, k0, v0), (q, k, v)))
                    rows.setdefault(f"copied from the mean of {tile} queries", []).append(nmse(here, true))
                    rows.setdefault(f"change of the mean of {tile} queries", []).append(nmse(old + here - then, true))
    return [{"method": name, "nmse": sum(found) / len(found)} for name, found in rows.items()]


class Capture(TorchFunctionMode):
    """Queries, keys and values of every self-attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
            if q.shape[2] == k.shape[2]:
                self.found.append((q.clone(), k.clone(), v.clone()))
        return func(*args, **kwargs)


def verdicts(result: Row) -> list[Row]:
    """What the issue asks of these figures."""

    def least(kind: str, against: str, density: float, far: str = "none", method: str = "sparse", low: int = 8192) -> float:
        return min(
            r[against] for r in result["speed"]
            if (r["dtype"], r["method"], r["density"], r["far"]) == (kind, method, density, far) and r["n"] >= low
        )  # fmt: skip

    wan = {row["method"]: row["nmse"] for row in result["wan"]}
    ratio = lambda a, b: min(x / y for x, y in zip(wan[a], wan[b], strict=True))  # noqa: E731
    top, window = "top 25 %, frozen, order {}, {} far field", "window 25 %, order {}, {} far field"
    extra = [row["extra"] for row in result["memory"] if row["extra"] is not None]
    long = "8k and 16k tokens"
    out: list[Row] = []
    need = promises(out)
    for d, limit in BF16.items():
        need(f"bf16, {long}, d={d:g}, over the best dense", least("bf16", "over_best", d), least=limit)
    for far in FAR:
        need(f"bf16, {long}, d=0.25 with the {far} far field", least("bf16", "over_best", 0.25, far), least=2)
    eight = [r["over_best"] for r in result["speed"] if (r["dtype"], r["n"], r["density"], r["far"]) == ("bf16", 8192, 0.25, "clusters")]
    need("bf16, 8k tokens, d=0.25 with the clusters far field, over the best dense", min(eight, default=None), least=BF16[0.25])
    for d, limit in FP32.items():
        need(f"fp32, {long}, d={d:g}, over SDPA", least("fp32", "over_sdpa", d), least=limit)
    need("dense autotune in bf16 over SDPA, 1k to 16k", least("bf16", "over_sdpa", 1.0, method="autotuned", low=0), least=2.5)
    need("extra peak memory at 8k bf16, MiB", max(extra) / 2**20 if extra else None, most=16)
    for name, row, limit, orders in (("top 25 %", top, 2, ORDERS[:2]), ("window", window, 1.5, ORDERS)):
        for plain, order in orders:
            what = f"{name}: order {plain} without / order {order} with far field, worst seed"
            need(what, ratio(row.format(plain, "no"), row.format(order, "centroid")), least=limit)
    sol.verdict(result.get("sol", []), need)
    return out


def tables_of(result: Row) -> list[Table]:
    """Every table, the verdicts last."""
    where = f"{result['machine']['cpu']}, {'with' if result['machine'].get('amx') else 'no'} AMX"
    out: list[Table] = [(f"one attention, x as fast as the best dense (as SDPA); {where}", *speeds(result))]
    rows = [[f"{r['density']:g}", r["far"], "" if r["extra"] is None else f"{r['extra'] / 2**20:.1f}"] for r in result["memory"]]
    out.append(("peak memory above the output, 8192 tokens, 4 heads of 128, bf16", ["density", "far field", "MiB"], rows))
    out.append((f"WAN mini, {STEPS} Euler steps, {result['samples']} clips, full every 4th step; seeds {result['seeds']}", *clips(result)))
    out.append(("one step's attention output beside ComfyUI's sol_attn, as many blocks read", *sol.cells(result.get("sol", []))))
    rows = [[r["method"], f"{r['nmse']:.4f}"] for r in result["queries"]]
    out.append(("WAN mini, one step's attention output by fewer queries (not more than this is promised)", ["method", "NMSE"], rows))
    return [*out, *closing(result)]


def speeds(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    keys = [("sparse", d, "none") for d in DENSITIES] + [("sparse", 0.25, far) for far in FAR]
    keys += [(f"means of {MEANS} queries", 1 / MEANS, "none"), ("autotuned", 1.0, "none")]
    head = [
        "dtype",
        "tokens",
        *(f"d={d:g}" for d in DENSITIES),
        *(f"d=0.25, {far} far" for far in FAR),
        f"means of {MEANS} queries",
        "dense, autotuned",
    ]
    rows = []
    for kind, (_, sizes) in SIZES.items():
        for n in sizes:
            found = {(r["method"], r["density"], r["far"]): r for r in result["speed"] if r["dtype"] == kind and r["n"] == n}
            if found:
                rows.append([kind, str(n), *(f"{found[key]['over_best']:.1f} ({found[key]['over_sdpa']:.1f})" for key in keys)])
    return head, rows


def clips(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [r["method"], f"{r['core']:.2f}", *(f"{x * 1e4:.1f}" for x in r["nmse"]), str(r["far_off"]) if "far field" in r["method"] else ""]
        for r in result["wan"]
    ]
    return ["between full steps", "core computed", *(f"NMSE e-4, seed {s}" for s in result["seeds"]), "far fields switched off"], rows


def plot(result: Row) -> str:
    """Speed over the best dense attention against tokens, as SVG; logarithmic, from 1/2 to 16."""
    chart = Chart(560, 330, 50, 150, lambda n: (math.log2(n) - 10) / 4, lambda s: math.log2(s * 2) / math.log2(32))
    for s in (0.5, 1, 2, 4, 8, 16):
        chart.rule(s, f"{s:g}x", "#888" if s == 1 else "#ddd")
    for n in (1024, 2048, 4096, 8192, 16384):
        chart.tick(n, f"{n // 1024}k")
    lines = [(0.1, "none", "#1f5fa8"), (0.25, "none", "#2e8b57"), (0.5, "none", "#d2691e"), (0.25, "centroid", "#8a2be2")]
    for i, (density, far, colour) in enumerate(lines):
        for kind, dash in (("bf16", ""), ("fp32", "5 3")):
            wanted = (kind, "sparse", density, far)
            found = [r for r in result["speed"] if (r["dtype"], r["method"], r["density"], r["far"]) == wanted]
            chart.line([(r["n"], r["over_best"]) for r in found], colour, dash)
        chart.legend(8, i, f"d = {density:g}" + ("" if far == "none" else ", far field"), colour)
    chart.legend(8, 5, "bf16, D = 128; dashed:", "#777")
    chart.legend(8, 6, "fp32, D = 64", "#777")
    return chart.svg("tokens; as fast as the best dense attention")
