"""``tqai bench llm``: perplexity, KL and bytes of KV caches on the trained mini; time and peak of a decode step."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import minis
from ..attention.packed import attend
from ..config import Config
from ..kv import PackedKV, Plan
from ..types import nbytes
from .harness import machine, one_thread

Row = dict[str, Any]
WINDOWS, LENGTH, PREFILL, CHUNK = 8, 1024, 320, 32


def ours(bits_k: int, bits_v: int, **options: Any) -> Config:
    return Config(level="kv", codec={"name": "turbo", "bits_k": bits_k, "bits_v": bits_v}, **{"recent": 32, "protect": 0, **options})


def windows() -> Tensor:
    """The same held-out bytes for everybody, ``[windows, length + 1]``."""
    text = minis.lm_text()
    starts = torch.linspace(0, len(text) - LENGTH - 1, WINDOWS).long()
    return torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()])


@torch.no_grad()
def logits(lm: Any, x: Tensor, cache: Any) -> Tensor:
    """Log probabilities ``[windows, length - prefill, 256]`` of the bytes after the prefill, read 32 at a time through the cache."""
    lm(x[:, :PREFILL], past_key_values=cache)
    out = [lm(x[:, at : at + CHUNK], past_key_values=cache).logits for at in range(PREFILL, LENGTH, CHUNK)]
    return torch.cat(out, 1).log_softmax(-1)


def quality(tell: Callable[[str], None], peers: bool) -> tuple[list[Row], dict[str, str]]:
    import tqai_core

    from ..adapters import lm_peers

    rows: list[Row] = []
    missing: dict[str, str] = {}
    x = windows()
    target = x[:, PREFILL + 1 :]
    for variant in minis.LM_VARIANTS:
        lm = minis.lm(variant)
        exact = logits(lm, x, lm_peers.exact(lm.config))
        nats = float(F.nll_loss(exact.flatten(0, 1), target.flatten()))
        rows.append(
            {
                "variant": variant,
                "cache": "DynamicCache",
                "bits": 16,
                "perplexity": math.exp(nats),
                "delta": 0.0,
                "kl": 0.0,
                "held_bits": 32.0,
            }
        )

        def add(
            name: str, bits: int, cache: Any, got: Tensor, variant: str = variant, exact: Tensor = exact, nats: float = nats, lm: Any = lm
        ) -> None:
            own = float(F.nll_loss(got.flatten(0, 1), target.flatten()))
            held = cache.nbytes if hasattr(cache, "nbytes") else sum(nbytes(vars(layer)) for layer in cache.layers)
            row = {
                "variant": variant, "cache": name, "bits": bits, "perplexity": math.exp(own), "delta": math.exp(own - nats) - 1,
                "kl": float((exact.exp() * (exact - got)).sum(-1).mean()),
                "held_bits": 8 * held / (2 * lm.config.num_hidden_layers * lm.config.num_key_value_heads * 64 * LENGTH * len(x)),
            }  # fmt: skip
            rows.append(row)
            tell(f"{variant}: {name} {bits} bits: {100 * row['delta']:+.3f} %, KL {row['kl']:.6f}, {row['held_bits']:.2f} bits held")

        settings: list[tuple[str, int, Config]] = [
            ("tqai k4v4", 4, ours(4, 4)), ("tqai k2v2", 2, ours(2, 2)), ("tqai k4v4, no window", 4, ours(4, 4, sink=0, recent=0)),
            ("tqai k4v2", 3, ours(4, 2)),
        ]  # fmt: skip
        for name, bits, config in settings:
            with tqai_core.apply(lm, config) as handle:
                cache = handle.cache()
                add(name, bits, cache, logits(lm, x, cache))
                if cache.materialised:
                    raise RuntimeError("a fused run made dense values")
        for bits in (4, 2) if peers else ():
            found, why = lm_peers.caches(lm.config, bits)
            missing |= why
            for name, make in found.items():
                other = make()
                add(name, bits, other, logits(lm, x, other))
    return rows, missing


# -- time and memory of a decode step


def _filled(tokens: int, d: int, dtype: torch.dtype) -> tuple[PackedKV, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    kv, keys, values = PackedKV(Plan(4, 4, recent=64)), [], []
    for _ in range(0, tokens, 2048):
        k, v = (torch.randn(1, 4, 2048, d, generator=g).to(dtype) for _ in range(2))
        kv.append(k, v)
        kv.observe(torch.randn(1, 16, 2048, d, generator=g).to(dtype))
        kv.settle()
        keys.append(k)
        values.append(v)
    return kv, torch.cat(keys, 2), torch.cat(values, 2)


def _peak(run: Callable[[], Any]) -> float:
    """MiB that ``run`` needs above what is held: the kernel's high-water mark, free memory given back first."""
    run()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0.0)
    except OSError:
        return math.nan


def _status(name: str) -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(name))


def step(tokens: Sequence[int] = (4096, 16384), repeats: int = 15) -> list[Row]:
    """One layer, 16 query and 4 key heads of 128, bf16: CPU ms, methods interleaved, median and least."""
    from ..adapters import lm_peers
    from ..adapters.transformers import sdpa_attention_forward

    class Module:
        num_key_value_groups, is_causal, training = 4, True, False

    rows = []
    for n in tokens:
        dtype = torch.bfloat16
        kv, k_all, v_all = _filled(n, 128, dtype)
        dynamic = lm_peers.DynamicLayer()
        dynamic.update(k_all, v_all)
        g = torch.Generator().manual_seed(1)
        new = [torch.randn(1, h, 1, 128, generator=g).to(dtype) for h in (16, 4, 4)]
        q, k, v = new

        def packed(kv: PackedKV = kv, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            kv.append(k, v)
            out = attend(q, kv, scaling=128**-0.5)
            kv.settle()
            return out

        def as_called(
            dynamic: Any = dynamic, k_all: Tensor = k_all, v_all: Tensor = v_all, q: Tensor = q, k: Tensor = k, v: Tensor = v
        ) -> Any:
            dynamic.keys, dynamic.values = k_all, v_all
            keys, values = dynamic.update(k, v)
            dynamic.keys, dynamic.values = k_all, v_all
            return sdpa_attention_forward(Module, q, keys, values, None, scaling=128**-0.5)[0]

        def best_dense(k_all: Tensor = k_all, v_all: Tensor = v_all, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            keys, values = torch.cat([k_all, k], 2), torch.cat([v_all, v], 2)
            return F.scaled_dot_product_attention(q.view(1, 4, 4, 128), keys, values)

        runs: dict[str, Callable[[], Any]] = {"packed, torch": packed, "DynamicCache as called": as_called, "best dense": best_dense}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                began = time.thread_time()
                run()
                times[name].append(1e3 * (time.thread_time() - began))
        for name, run in runs.items():
            held = kv.nbytes if run is packed else k_all.nbytes + v_all.nbytes
            rows.append({
                "tokens": n, "method": name, "ms": median(times[name]), "ms_least": min(times[name]), "held_mib": held / 2**20,
                "peak_mib": _peak(run),
            })  # fmt: skip
    return rows


def held() -> list[Row]:
    """Bits a coordinate at 2048 tokens, K4V4, sinks 4, recent 32, everything counted."""
    rows = []
    for d in (64, 128):
        kv = PackedKV(Plan(4, 4, sink=4, recent=32))
        g = torch.Generator().manual_seed(0)
        kv.append(*(torch.randn(1, 4, 2048, d, generator=g).bfloat16() for _ in range(2)))
        kv.observe(torch.randn(1, 16, 2048, d, generator=g).bfloat16())
        kv.settle()
        rows.append({"d": d, "bits": 8 * kv.nbytes / (2 * 4 * 2048 * d)})
    return rows


@torch.no_grad()
def model_decode(tokens: int = 4096, count: int = 24) -> list[Row]:
    """A random Qwen2 of 4 layers, 8 query and 2 key heads of 64, fp32: CPU ms a token at so many tokens."""
    import tqai_core

    from ..adapters import lm, lm_peers

    model = lm.random_qwen2()
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"packed, torch": [], "DynamicCache": []}
    handle = tqai_core.apply(model, ours(4, 4, recent=64))
    packed = handle.cache()
    model(ids, past_key_values=packed)
    handle.remove()
    dynamic = lm_peers.exact(model.config)
    model(ids, past_key_values=dynamic)
    for _ in range(count):
        for name, cache in (("packed, torch", packed), ("DynamicCache", dynamic)):
            model.set_attn_implementation("tqai" if cache is packed else "sdpa")
            began = time.thread_time()
            model(ids[:, :1], past_key_values=cache)
            times[name].append(1e3 * (time.thread_time() - began))
    return [{"tokens": tokens, "method": name, "ms": median(t), "ms_least": min(t)} for name, t in times.items()]


def bench(peers: bool = True, tell: Callable[[str], None] = lambda text: None) -> Row:
    one_thread()
    tell("bytes, time and peak of one decode step")
    result: Row = {"bench": "llm", "machine": machine(), "held": held(), "step": step()}
    tell("a whole model")
    result["model"] = model_decode()
    tell("perplexity")
    result["quality"], result["missing"] = quality(tell, peers)
    result["verdicts"] = verdicts(result)
    return result


def verdicts(result: Row) -> list[Row]:
    """The project's promises beside what was measured here."""
    out: list[Row] = []

    def need(what: str, measured: float | None, least: float | None = None, most: float | None = None) -> None:
        ok = measured is not None and (least is None or measured >= least) and (most is None or measured <= most)
        bound = f">= {least:g}" if least is not None else f"<= {most:g}"
        out.append({"what": what, "measured": measured, "needed": bound, "ok": bool(ok)})

    rows = result["quality"]
    at = {(r["variant"], r["cache"], r["bits"]): r for r in rows}
    for variant, four in (("plain", 0.001), ("outlier", 0.003), ("bias", 0.003)):
        need(f"delta perplexity, {variant}, 4 bits", at[variant, "tqai k4v4", 4]["delta"], most=four)
        need(f"delta perplexity, {variant}, 2 bits", at[variant, "tqai k2v2", 2]["delta"], most=0.003)
    for bits, name, most in ((4, "tqai k4v4", 1.0), (2, "tqai k2v2", 0.6)):
        others = [r["kl"] for r in rows if r["variant"] == "plain" and r["bits"] == bits and not r["cache"].startswith("tqai k")]
        need(f"KL to the best peer, {bits} bits", at["plain", name, bits]["kl"] / min(others) if others else None, most=most)
    for row, most in zip(result["held"], (4.6, 4.45), strict=True):
        need(f"bits a coordinate held, d = {row['d']}", row["bits"], most=most)
    last = {r["method"]: r for r in result["step"] if r["tokens"] == 16384}
    mine = last["packed, torch"]
    need("peak of a step at 16k above held, MiB", mine["peak_mib"], most=2)
    need("step at 16k: times faster than DynamicCache", last["DynamicCache as called"]["ms"] / mine["ms"], least=5)
    need("step at 16k: times the speed of the best dense", last["best dense"]["ms"] / mine["ms"], least=0.9)
    model = {r["method"]: r["ms"] for r in result["model"]}
    need("whole model at 4k: times faster than DynamicCache", model["DynamicCache"] / model["packed, torch"], least=1)
    return out


def tables_of(result: Row) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    rows = []
    for r in result["quality"]:
        figures = [f"{r['perplexity']:.4f}", f"{100 * r['delta']:+.3f}", f"{r['kl']:.6f}"]
        rows.append([r["variant"], r["cache"], str(r["bits"]), f"{r['held_bits']:.2f}", *figures])
    yield (
        f"Perplexity of the mini's held-out bytes ({WINDOWS} windows of {LENGTH}, prefill {PREFILL}, then {CHUNK} at a time)",
        ["variant", "cache", "bits", "bits held", "perplexity", "delta %", "KL"],
        rows,
    )
    yield (
        "One decode step, one layer: 16 query and 4 key heads of 128, bf16",
        ["tokens", "method", "CPU ms", "least", "held MiB", "peak above held MiB"],
        [
            [str(r["tokens"]), r["method"], f"{r['ms']:.2f}", f"{r['ms_least']:.2f}", f"{r['held_mib']:.2f}", f"{r['peak_mib']:.1f}"]
            for r in result["step"]
        ],
    )
    yield (
        "Whole model",
        ["tokens", "method", "CPU ms", "least"],
        [[str(r["tokens"]), r["method"], f"{r['ms']:.2f}", f"{r['ms_least']:.2f}"] for r in result["model"]],
    )
    yield (
        "Promises",
        ["what", "measured", "needed", "ok"],
        [
            [v["what"], "" if v["measured"] is None else f"{v['measured']:.5g}", v["needed"], "yes" if v["ok"] else "NO"]
            for v in result["verdicts"]
        ],
    )
    for name, why in result["missing"].items():
        yield f"not compared: {name}", ["why"], [[why]]
