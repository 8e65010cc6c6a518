"""``tqai bench llm``: perplexity, KL and bytes of KV caches on the trained mini; time and peak of a decode step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai_core import minis
from tqai_core.attention.backends import native as kernel
from tqai_core.attention.packed import attend
from tqai_core.config import Config
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.segments import Plan
from tqai_core.peak import PROC, Peak
from tqai_core.types import nbytes

from .harness import Row, Table, closing, machine, one_thread, promises
from .plot import Chart

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

    from . import lm_caches as lm_peers

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
            ("tqai k4v4", 4, ours(4, 4)), ("tqai k2v2", 2, ours(2, 2)), ("tqai k5v4, 32 exact", 4, ours(5, 4, recent=28)),
            ("tqai k5v4, 64 exact", 4, ours(5, 4, recent=60)),
            ("tqai k5v4, no window", 4, ours(5, 4, sink=0, recent=0)), ("tqai k4v4, no window", 4, ours(4, 4, sink=0, recent=0)),
            ("tqai k2v2, no window", 2, ours(2, 2, sink=0, recent=0)), ("tqai k4v2", 3, ours(4, 2)),
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
    with Peak(torch.device("cpu")) as peak:
        run()
    return math.nan if peak.nbytes is None or peak.how != PROC else peak.nbytes / 2**20


def _decoders(kv: PackedKV, k_all: Tensor, v_all: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to read one new token of 16 query heads after the tokens of ``kv``, which ``k_all`` and ``v_all`` hold densely."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from . import lm_caches as lm_peers

    class Module:
        num_key_value_groups, is_causal, training = 4, True, False

    dynamic = lm_peers.DynamicLayer()
    dynamic.update(k_all, v_all)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, 1, 128, generator=g).to(k_all.dtype) for h in (16, 4, 4))

    def packed(native: bool) -> Tensor:
        kv.append(k, v)
        out = attend(q, kv, scaling=128**-0.5, native=native)
        kv.settle()
        return out

    def as_called() -> Any:
        dynamic.keys, dynamic.values = k_all, v_all
        keys, values = dynamic.update(k, v)
        dynamic.keys, dynamic.values = k_all, v_all
        return sdpa_attention_forward(Module, q, keys, values, None, scaling=128**-0.5)[0]

    grown_k, grown_v = (torch.cat([x, x[:, :, :1]], 2) for x in (k_all, v_all))

    def best_dense() -> Tensor:
        torch.cat([k_all, k], 2, out=grown_k)  # into memory kept for it: fresh pages at each call would triple its time
        torch.cat([v_all, v], 2, out=grown_v)
        return F.scaled_dot_product_attention(q.view(1, 4, 4, 128), grown_k, grown_v)

    def no_cat() -> Tensor:
        grown_k[:, :, -1:], grown_v[:, :, -1:] = k, v
        return F.scaled_dot_product_attention(q.view(1, 4, 4, 128), grown_k, grown_v)

    runs: dict[str, Callable[[], Any]] = {
        "packed, torch": partial(packed, False), "DynamicCache as called": as_called, "best dense": best_dense, "dense, no cat": no_cat,
    }  # fmt: skip
    return runs | ({"packed, native": partial(packed, True)} if kernel.ready() else {})


def step(tokens: Sequence[int] = (4096, 16384), repeats: int = 15) -> list[Row]:
    """One layer, 16 query and 4 key heads of 128, bf16: CPU ms, methods interleaved, median and least."""
    rows = []
    for n in tokens:
        kv, k_all, v_all = _filled(n, 128, torch.bfloat16)
        runs = _decoders(kv, k_all, v_all)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                began = time.thread_time()
                run()
                times[name].append(1e3 * (time.thread_time() - began))
        for name, run in runs.items():
            held = kv.nbytes if name.startswith("packed") else (k_all.nbytes + v_all.nbytes) * (2 if name == "best dense" else 1)
            rows.append({
                "tokens": n, "method": name, "ms": median(times[name]), "ms_least": min(times[name]), "held_mib": held / 2**20,
                "peak_mib": _peak(run),
            })  # fmt: skip
    return rows


def held() -> list[Row]:
    """Bits a coordinate at 2048 tokens, K4V4, sinks 4, recent 32, everything counted: values of equal and of falling energy."""
    rows = []
    for d in (64, 128):
        for fall in (0.0, 6.0):
            kv = PackedKV(Plan(4, 4, sink=4, recent=32))
            g = torch.Generator().manual_seed(0)
            k, v = (torch.randn(1, 4, 2048, d, generator=g) for _ in range(2))
            kv.append(k.bfloat16(), (v * torch.linspace(0, -fall, d).exp()).bfloat16())
            kv.observe(torch.randn(1, 16, 2048, d, generator=g).bfloat16())
            kv.settle()
            rows.append({"d": d, "fall": fall, "bits_v": list(kv.bits_v), "bits": 8 * kv.nbytes / (2 * 4 * 2048 * d)})
    return rows


@torch.no_grad()
def model_decode(tokens: int = 4096, count: int = 24) -> list[Row]:
    """A random Qwen2 of 4 layers, 8 query and 2 key heads of 64, fp32: CPU ms a token at so many tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tqai_core

    from . import lm_caches as lm_peers

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"packed, torch": [], "packed, native": [], "DynamicCache": []}
    if not kernel.ready():
        del times["packed, native"]
    handle = tqai_core.apply(model, ours(4, 4, recent=64))
    caches = {name: handle.cache() for name in times if name != "DynamicCache"}
    for cache in caches.values():
        model(ids, past_key_values=cache)
    handle.remove()
    dynamic = lm_peers.exact(model.config)
    model(ids, past_key_values=dynamic)
    for _ in range(count):
        for name in times:
            model.set_attn_implementation("sdpa" if name == "DynamicCache" else "tqai")
            with _switch("0" if name == "packed, torch" else None):
                began = time.thread_time()
                model(ids[:, :1], past_key_values=caches.get(name, dynamic))
                times[name].append(1e3 * (time.thread_time() - began))
    return [{"tokens": tokens, "method": name, "ms": median(t), "ms_least": min(t)} for name, t in times.items()]


@contextmanager
def _switch(value: str | None) -> Iterator[None]:
    """TQAI_NATIVE for a while; None leaves it as it is."""
    had = os.environ.get("TQAI_NATIVE")
    if value is not None:
        os.environ["TQAI_NATIVE"] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop("TQAI_NATIVE")
            if had is not None:
                os.environ["TQAI_NATIVE"] = had


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
    need = promises(out)
    rows = result["quality"]
    at = {(r["variant"], r["cache"], r["bits"]): r for r in rows}
    for variant, four in (("plain", 0.001), ("outlier", 0.003), ("bias", 0.003)):
        need(f"delta perplexity, {variant}, 4 bits", at[variant, "tqai k4v4", 4]["delta"], most=four)
        need(f"delta perplexity, {variant}, 2 bits", at[variant, "tqai k2v2", 2]["delta"], most=0.003)
    for bits, most in ((4, 1.0), (2, 0.6)):
        if any(r["bits"] == bits and not _is_ours(r) for r in rows):  # with --no-peers there are none
            need(f"KL against the hardest peer, ours holding no more bits, {bits} bits", _against(rows, bits), most=most)
    for d, most in ((64, 4.6), (128, 4.45)):
        need(f"bits a coordinate held, d = {d}", max(r["bits"] for r in result["held"] if r["d"] == d), most=most)
    last = {r["method"]: r for r in result["step"] if r["tokens"] == 16384}
    model = {r["method"]: r["ms"] for r in result["model"]}
    for name, best in (("torch", 0.9), ("native", 4.0)):
        mine = last.get(f"packed, {name}")
        need(f"step at 16k, {name}: peak above held, MiB", mine and mine["peak_mib"], most=2)
        need(
            f"step at 16k, {name}: times faster than DynamicCache",
            mine and last["DynamicCache as called"]["ms"] / mine["ms"],
            least=5,
        )
        need(
            f"step at 16k, {name}: times the speed of the fastest dense",
            mine and fastest_dense(result["step"], 16384) / mine["ms"],
            least=best,
        )
        whole = model.get(f"packed, {name}")
        need(f"whole model at 4k, {name}: times the speed of DynamicCache", whole and model["DynamicCache"] / whole, least=1)
    return out


def fastest_dense(rows: list[Row], tokens: int) -> float:
    """CPU ms of the fastest way to read dense keys and values that was measured at so many tokens."""
    return min(r["ms"] for r in rows if r["tokens"] == tokens and not r["method"].startswith("packed"))


def _is_ours(row: Row) -> bool:
    return row["cache"].startswith("tqai k")


def _against(rows: list[Row], bits: int) -> float | None:
    """The largest ratio, over the peers, of our least KL with no more bits held than that peer."""
    plain = [r for r in rows if r["variant"] == "plain"]
    mine = [r for r in plain if _is_ours(r)]
    ratios = [
        min([r["kl"] for r in mine if r["held_bits"] <= peer["held_bits"]], default=math.inf) / peer["kl"]
        for peer in plain
        if peer["bits"] == bits and not _is_ours(peer)
    ]
    return max(ratios, default=None)


def tables_of(result: Row) -> Iterable[Table]:
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
    yield from closing(result)


def plot(result: Row) -> str:
    """KL to the unquantised mini against all bits held, every cache, as SVG: left and low is better."""
    rows = [r for r in result["quality"] if r["variant"] == "plain" and r["kl"] > 0]
    low = min(math.log10(r["kl"]) for r in rows) - 0.2
    chart = Chart(600, 360, 60, 14, lambda bits: (bits - 2) / 8, lambda kl: (math.log10(kl) - low) / (-1 - low))
    for e in range(1, int(-low) + 1):
        chart.rule(10**-e, f"1e-{e}")
    for bits in range(2, 11):
        chart.tick(bits, str(bits))
    for r in rows:
        ours = r["cache"].startswith("tqai k")
        label = r["cache"] if ours else f"{r['cache']} {r['bits']}"
        chart.dot(r["held_bits"], r["kl"], "#1f5fa8" if ours else "#d2691e", label, before=r["held_bits"] > 7)
    return chart.svg(f"bits a coordinate, everything counted; KL on {WINDOWS} windows of {LENGTH}")
