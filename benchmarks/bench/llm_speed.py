"""``tqai bench llm_speed``: a whole model of SmolLM2's shape, its caches interleaved: steps on one thread, then on two, and prefill.

Random weights: time does not depend on them. The bar is the fastest dense row of each table, whatever its cache and attention.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tqai_core.attention.backends import native as kernel
from tqai_core.config import Config

from .harness import Row, Table, closing, machine, one_thread, promises

ARCHITECTURE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
DECODE = (("float32", 2048, 1), ("float32", 4096, 1), ("float32", 8192, 1), ("bfloat16", 8192, 1), ("float32", 4096, 2))
PREFILL_LAYERS = 4  # of a prompt: all layers take the same time
DENSE = ("DynamicCache, sdpa", "DynamicCache, eager")
FLOOR = "no attention, no cache"
CONFIG = Config(level="kv", codec="turbo:bits_k=4,bits_v=4")


@dataclass(frozen=True)
class Way:
    """One way to decode: a cache, and the attention that reads it; without a cache the model alone."""

    name: str
    cache: Any
    attention: str


def _model(dtype: str, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**ARCHITECTURE, "num_hidden_layers": layers})
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)


def _ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, ARCHITECTURE["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))


def _filled(model: Any, tokens: int) -> list[Way]:
    """Caches that hold so many random tokens, and as whose attention they are read. Dense ones share theirs."""
    import tqai_core

    from . import lm_caches

    config, g = model.config, torch.Generator().manual_seed(1)
    dense, packed, bare = lm_caches.exact(config), tqai_core.KVCache(config, CONFIG), tqai_core.KVCache(config, CONFIG)
    random = lambda heads: torch.randn(1, heads, tokens, 64, generator=g).to(model.dtype)  # noqa: E731
    for layer in range(config.num_hidden_layers):
        k, v, q = random(3), random(3), random(9)
        dense.update(k, v, layer)
        for cache in (packed, bare):
            cache.update(k, v, layer)
            cache.layers[layer].kv.observe(q)
            cache.layers[layer].kv.settle()
    ways = [Way(name, dense, name.split(", ")[1]) for name in DENSE]
    return [*ways, Way("tqai k4v4", packed, "tqai"), Way("tqai k4v4, bare cache", bare, "sdpa"), Way(FLOOR, None, "nothing")]


def _no_attention(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


def decode(dtype: str, tokens: int, threads: int = 1, count: int = 9, layers: int = 30) -> list[Row]:
    """CPU ms of a step, of all threads together, the median of ``count``, the ways interleaved; every step is taken back from a dense
    cache."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    import tqai_core

    model, token = _model(dtype, layers), _ids(1)
    tqai_core.apply(model, CONFIG).remove()  # makes its attention known
    AttentionInterface.register("nothing", _no_attention)
    AttentionMaskInterface.register("nothing", sdpa_mask)
    times: dict[str, list[float]] = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ways = _filled(model, tokens)
        torch.set_num_threads(threads)
        for way in ways * (count + 1):
            model.set_attn_implementation(way.attention)
            began = time.process_time()
            model(token, past_key_values=way.cache, use_cache=way.cache is not None)
            times.setdefault(way.name, []).append(1e3 * (time.process_time() - began))
            if way.name in DENSE:
                way.cache.crop(-1)
        torch.set_num_threads(1)
    rows: list[Row] = []
    for way in ways:
        dense = [] if way.cache is None else way.cache.layers
        held = way.cache.nbytes if hasattr(way.cache, "nbytes") else sum(x.keys.nbytes + x.values.nbytes for x in dense)
        place: Row = {"dtype": dtype, "tokens": tokens, "threads": threads, "method": way.name}
        rows.append({**place, "ms": median(times[way.name][1:]), "held_mib": held / 2**20})
    return rows


def prefill(tokens: int = 4096, count: int = 3, layers: int = PREFILL_LAYERS) -> list[Row]:
    """CPU s of a prompt at once in fp32 on one thread, and of the packing in it alone."""
    import tqai_core
    from tqai_core.kv.cache import PackedKV

    from . import lm_caches

    model, ids = _model("float32", layers), _ids(tokens)
    times: dict[str, list[float]] = {"DynamicCache, sdpa": [], "tqai k4v4": [], "of it packing": []}
    settle = PackedKV.settle

    def timed(kv: PackedKV) -> None:
        began = time.thread_time()
        settle(kv)
        spent.append(time.thread_time() - began)

    for _ in range(count):
        model.set_attn_implementation("sdpa")
        began = time.thread_time()
        with torch.no_grad():
            model(ids, past_key_values=lm_caches.exact(model.config), logits_to_keep=1)
        times["DynamicCache, sdpa"].append(time.thread_time() - began)
        spent: list[float] = []
        PackedKV.settle = timed  # type: ignore[method-assign]
        try:
            with tqai_core.apply(model, CONFIG) as handle, torch.no_grad():
                cache = handle.cache()
                began = time.thread_time()
                model(ids, past_key_values=cache, logits_to_keep=1)
                times["tqai k4v4"].append(time.thread_time() - began)
        finally:
            PackedKV.settle = settle  # type: ignore[method-assign]
        times["of it packing"].append(sum(spent))
    return [{"tokens": tokens, "method": name, "s": median(t)} for name, t in times.items()]


def bench(tell: Callable[[str], None] = lambda text: None, layers: int = 30) -> Row:
    one_thread()
    result: Row = {"bench": "llm_speed", "machine": machine(), "kernel": kernel.kind() if kernel.ready() else "none", "decode": []}
    for dtype, tokens, threads in DECODE:
        tell(f"decoding in {dtype} at {tokens} tokens, threads: {threads}")
        result["decode"] += decode(dtype, tokens, threads, layers=layers)
    tell("prefill")
    result["prefill"] = prefill(layers=min(layers, PREFILL_LAYERS))
    result["verdicts"] = verdicts(result)
    return result


def ratio(result: Row, dtype: str, tokens: int, threads: int = 1, method: str = "tqai k4v4", bar: str = DENSE[0]) -> float:
    """Speed of a method over that of ``bar``."""
    rows = {r["method"]: r["ms"] for r in result["decode"] if (r["dtype"], r["tokens"], r["threads"]) == (dtype, tokens, threads)}
    return float(rows[bar] / rows[method])


def fastest_dense(result: Row, dtype: str, tokens: int, threads: int) -> str:
    """The dense method that takes the least time there."""
    return max(DENSE, key=lambda name: ratio(result, dtype, tokens, threads, name))


def verdicts(result: Row) -> list[Row]:
    out: list[Row] = []
    need = promises(out)
    for dtype, tokens, least in (("float32", 4096, 1.8), ("bfloat16", 8192, 2.0)):
        need(
            f"step of SmolLM2's shape, {dtype}, {tokens} tokens: times the speed of DynamicCache",
            ratio(result, dtype, tokens),
            least=least,
        )
    bare = 1 / ratio(result, "float32", 4096, method="tqai k4v4, bare cache")
    need("step of SmolLM2's shape, bare cache: times the time of DynamicCache", bare, most=1.5)
    seconds = {r["method"]: r["s"] for r in result["prefill"]}
    need("prefill of SmolLM2's shape: times the time of DynamicCache", seconds["tqai k4v4"] / seconds["DynamicCache, sdpa"], most=1.05)
    return out


def cells(result: Row) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the steps, for the terminal and for the page."""
    rows = []
    for r in result["decode"]:
        place = (r["dtype"], r["tokens"], r["threads"])
        speeds = [ratio(result, *place, r["method"], bar) for bar in (DENSE[0], fastest_dense(result, *place))]
        rows.append(
            [
                r["dtype"],
                f"{r['tokens']:,}",
                str(r["threads"]),
                r["method"],
                f"{r['ms']:.1f}",
                *(f"{x:.2f}" for x in speeds),
                f"{r['held_mib']:.1f}",
            ]
        )
    return ["dtype", "tokens", "threads", "cache", "CPU ms a step", "x DynamicCache, sdpa", "x fastest dense", "held MiB"], rows


def tables_of(result: Row) -> Iterable[Table]:
    cpu = result["machine"]["cpu"]
    yield (f"A step of a model of SmolLM2's shape on {cpu}, CPU time of all threads", *cells(result))
    rows = [[f"{r['tokens']:,}", r["method"], f"{r['s']:.2f}"] for r in result["prefill"]]
    yield (f"A prompt at once through {PREFILL_LAYERS} of its layers, fp32", ["tokens", "cache", "CPU s"], rows)
    yield from closing(result)
