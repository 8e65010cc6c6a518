"""``tqai bench llm --methods``: scorers, strategies and monitors at level kv on the trained mini, against a plain packed cache."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai_core import minis
from tqai_core.attention.packed import attend
from tqai_core.config import Config
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.policy import policy
from tqai_core.kv.segments import Plan
from tqai_core.registry import REGISTRY, names

from . import llm
from .harness import machine, one_thread

Row = dict[str, Any]
PLAIN = ((2, 2), (3, 3), (4, 4), (8, 4))
SEEDS = (0, 1, 2)  # of the rotation
FEW = 4  # windows of the triples
TIERS = {2: "tiered:share=0.5,high=4", 4: "tiered:share=0.25,high=8"}


def known(role: str) -> list[str]:
    """Methods of this level that need no file."""
    return [n for n in names(role) if "kv" in REGISTRY[role][n].levels and "file" not in REGISTRY[role][n].options()]


class Judge:
    """Runs configs on the same windows of held-out bytes, and compares with plain caches of as many bytes."""

    def __init__(self, count: int) -> None:
        from . import lm_caches as lm_peers

        self.lm, self.x = minis.lm(), llm.windows()[:count]
        self.exact = llm.logits(self.lm, self.x, lm_peers.exact(self.lm.config))
        self.target = self.x[:, llm.PREFILL + 1 :].flatten()
        self.nats = float(F.nll_loss(self.exact.flatten(0, 1), self.target))
        self.curve: list[tuple[float, float]] = []

    def row(self, bits: tuple[int, int], seeds: Sequence[int], **stages: Any) -> Row:
        """KL to the uncoded model, delta perplexity and bits held a coordinate, everything counted; medians over ``seeds``."""
        import tqai_core

        found: dict[str, list[float]] = {"kl": [], "delta": [], "held_bits": []}
        sites: dict[str, Any] = {}
        for seed in seeds:
            codec = {"name": "turbo", "bits_k": bits[0], "bits_v": bits[1], "seed": seed}
            with tqai_core.apply(self.lm, Config(level="kv", codec=codec, recent=32, protect=0, **stages)) as handle:
                cache = handle.cache()
                got = llm.logits(self.lm, self.x, cache)
            if cache.materialised:
                raise RuntimeError("a fused run made dense values")
            config = self.lm.config
            numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * 64 * llm.LENGTH * len(self.x)
            found["kl"].append(float((self.exact.exp() * (self.exact - got)).sum(-1).mean()))
            found["delta"].append(math.exp(float(F.nll_loss(got.flatten(0, 1), self.target)) - self.nats) - 1)
            found["held_bits"].append(8 * cache.nbytes / numbers)
            sites = cache.report().per_site
        row: Row = {"bits": f"k{bits[0]}v{bits[1]}", **{name: median(values) for name, values in found.items()}}
        row["bits_k"], row["bits_v"] = (sum(s[name] for s in sites.values()) / len(sites) for name in ("bits_k", "bits_v"))
        row["notes"] = _notes(list(sites.values()))
        row["against_plain"] = row["kl"] / self.plain(row["held_bits"]) if self.curve else 1.0
        return row

    def plain(self, held: float) -> float:
        """KL of a plain cache of so many held bits: log-linear between the settings there are."""
        at = next((i for i in range(1, len(self.curve) - 1) if held <= self.curve[i][0]), len(self.curve) - 1)
        (a, low), (b, high) = self.curve[at - 1 : at + 1]
        return math.exp(math.log(low) + (held - a) / (b - a) * math.log(high / low))

    def plains(self, seeds: Sequence[int]) -> list[Row]:
        rows = [self.row(bits, seeds) for bits in PLAIN]
        self.curve = [(r["held_bits"], r["kl"]) for r in rows]
        return rows


def _notes(sites: list[Row]) -> str:
    """What the layers decided."""
    out = []
    if "predicted" in sites[0]:
        out.append("predicted " + ", ".join(f"{s['residual_energy']:.2f}" if s["predicted"] else "no" for s in sites))
    if "share_read" in sites[0]:
        out.append(f"read {sum(s['share_read'] for s in sites) / len(sites):.0%}")
    if "flushes_raised" in sites[0]:
        out.append("raised " + ", ".join(str(s["flushes_raised"]) for s in sites) + f" of {max(s['flushes'] for s in sites)}")
    return "; ".join(out)


def alone() -> list[tuple[str, int, Row]]:
    """(name, bits, stages) of every method on its own, at 2 and 4 bits; tiers and windows with every scorer."""
    rows: list[tuple[str, int, Row]] = []
    every: list[str | None] = [None, *known("scorer")]
    for bits in (2, 4):
        rows += [(name, bits, {"scorer": name}) for name in known("scorer")]
        for scorer in every:
            rows.append((f"{TIERS[bits]} by {scorer or 'largest error'}", bits, {"scorer": scorer, "strategy": TIERS[bits]}))
        for strategy in [n for n in known("strategy") if n not in ("tiered", "window")]:
            rows.append((strategy, bits, {"strategy": strategy}))
        for monitor in known("monitor"):
            rows.append((monitor, bits, {"monitor": monitor}))
    for scorer in every:
        rows.append((f"window by {scorer or 'nearness'}", 4, {"scorer": scorer, "strategy": "window"}))
    return rows


def reading(tokens: int = 16384, repeats: int = 15) -> list[Row]:
    """One decode step of one layer, 16 query and 4 key heads of 128, bf16: CPU ms, methods interleaved, medians."""
    g = torch.Generator().manual_seed(0)
    rnd = lambda *size: torch.randn(*size, generator=g).bfloat16()  # noqa: E731
    runs: dict[str, Callable[[], Tensor]] = {}
    settings: dict[str, Row] = {"plain": {}, "tiered": {"strategy": "tiered"}, "delta": {"strategy": "delta"}}
    for scorer, density in ((None, 0.25), ("bsa", 0.25), ("bsa", 0.1)):
        name = f"window by {scorer or 'nearness'}, density {density}"
        settings[name] = {"scorer": scorer, "strategy": {"name": "window", "density": density, "block": 64}}
    drift = torch.randn(1, 4, tokens // 64, 128, generator=g).repeat_interleave(64, 2)
    k, v = (rnd(1, 4, tokens, 128) + drift).bfloat16(), rnd(1, 4, tokens, 128)
    q_all, new = rnd(1, 16, tokens, 128), [rnd(1, h, 1, 128) for h in (16, 4, 4)]
    for name, stages in settings.items():
        methods, plan = policy(Config(level="kv", **stages), Plan(), 0, 1)
        kv = PackedKV(plan, methods)
        for a in range(0, tokens, 2048):
            kv.append(k[:, :, a : a + 2048], v[:, :, a : a + 2048])
            kv.observe(q_all[:, :, a : a + 2048])
            kv.settle()

        def step(kv: PackedKV = kv) -> Tensor:
            kv.append(new[1], new[2])
            out = attend(new[0], kv, scaling=128**-0.5)
            kv.crop(1)
            return out

        runs[name] = step
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            if i >= 2:
                times[name].append(1e3 * (time.thread_time() - began))
    base = median(times["plain"])
    return [{"tokens": tokens, "method": name, "ms": median(t), "against_plain": median(t) / base} for name, t in times.items()]


def bench(tell: Callable[[str], None] = lambda text: None) -> Row:
    one_thread()
    tell("time of a step")
    result: Row = {"bench": "llm_methods", "machine": machine(), "seeds": list(SEEDS), "step": reading()}
    judge = Judge(llm.WINDOWS)
    tell("plain caches")
    result["plain"] = judge.plains(SEEDS)
    result["alone"] = []
    for name, bits, stages in alone():
        result["alone"].append({"method": name, **judge.row((bits, bits), SEEDS, **stages)})
        last = result["alone"][-1]
        tell(f"{name}, {bits} bits: KL {last['kl']:.6f}, {last['held_bits']:.2f} bits held, {last['against_plain']:.2f} of a plain one")
    few = Judge(FEW)
    few.plains(SEEDS[:1])
    result["triples"] = []
    roles = [[None, *known(role)] for role in ("scorer", "strategy", "monitor")]
    for scorer, strategy, monitor in itertools.product(*roles):
        if scorer or strategy or monitor:
            found = few.row((4, 4), SEEDS[:1], scorer=scorer, strategy=strategy, monitor=monitor)
            result["triples"].append({"scorer": scorer or "none", "strategy": strategy or "none", "monitor": monitor or "none", **found})
    tell(f"{len(result['triples'])} triples")
    return result


def _cells(r: Row) -> list[str]:
    bits = f"{r['bits_k']:.2f} / {r['bits_v']:.2f}"
    return [bits, f"{r['held_bits']:.2f}", f"{r['kl']:.6f}", f"{100 * r['delta']:+.3f}", f"{r['against_plain']:.2f}", r["notes"]]


def tables_of(result: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    head = ["bits k / v", "bits held", "KL", "delta perplexity %", "KL to plain of equal bytes", "layers"]
    own = [["plain", r["bits"], *_cells(r)] for r in result["plain"]]
    rows = [[r["method"], r["bits"], *_cells(r)] for r in result["alone"]]
    triples = [[r["scorer"], r["strategy"], r["monitor"], *_cells(r)] for r in result["triples"]]
    steps = [[str(r["tokens"]), r["method"], f"{r['ms']:.2f}", f"{r['against_plain']:.2f}"] for r in result["step"]]
    return [
        ("kv: each method alone", ["method", "base", *head], own + rows),
        ("kv: one decode step, 16 query and 4 key heads of 128, bf16", ["tokens", "method", "CPU ms", "to plain"], steps),
        ("kv: every triple over k4v4", ["scorer", "strategy", "monitor", *head], triples),
    ]
