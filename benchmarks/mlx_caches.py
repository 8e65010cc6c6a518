"""Prompt caches of mlx-lm on the trained mini and its stress variants, then the peak and the time of a long prompt.

    python benchmarks/mlx_caches.py benchmarks/results/mlx.json [long plain outlier bias]

The windows are those of ``tqai bench llm``: 8 of 1024 bytes, 320 read at once, then 32 at a time. One stream of mlx's CPU build.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from bench import llm
from bench.harness import machine
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as caches
from mlx_lm.models import qwen2
from safetensors import safe_open

from tqai_core import minis
from tqai_core.hosts.mlx import make_prompt_cache

OWN = "mlx-lm's own, from the first token"
METHODS: list[tuple[str, int, Callable[[Any], list[Any]]]] = [
    ("tqai", 4, lambda model: make_prompt_cache(model, llm.ours(4, 4))),
    ("tqai", 2, lambda model: make_prompt_cache(model, llm.ours(2, 2))),
    ("tqai, no sinks or window", 4, lambda model: make_prompt_cache(model, llm.ours(4, 4, sink=0, recent=0))),
    (OWN, 4, lambda model: [caches.QuantizedKVCache(64, 4) for _ in model.layers]),
    (OWN, 2, lambda model: [caches.QuantizedKVCache(64, 2) for _ in model.layers]),
]


def mini(variant: str = "plain") -> Any:
    """The trained mini language model (:func:`tqai_core.minis.lm`) as mlx-lm's Qwen2, fp32. Needs transformers too."""
    source = minis.lm(variant)
    with safe_open(str(Path(minis.__file__).with_name("lm.safetensors")), framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config | {"model_type": "qwen2", "rms_norm_eps": source.config.rms_norm_eps}))
    model.load_weights([(name, mx.array(w.numpy())) for name, w in source.state_dict().items()])
    return model


def logits(model: Any, x: mx.array, cache: list[Any]) -> mx.array:
    mx.eval(model(x[:, : llm.PREFILL], cache=cache))
    out = []
    for at in range(llm.PREFILL, llm.LENGTH, llm.CHUNK):
        y = model(x[:, at : at + llm.CHUNK], cache=cache)
        out.append(y - mx.logsumexp(y, -1, keepdims=True))
        mx.eval(out[-1], [c.state for c in cache])
    return mx.concatenate(out, 1)


def quality(variant: str) -> list[dict[str, Any]]:
    x = mx.array(llm.windows().numpy())
    target = x[:, llm.PREFILL + 1 :, None]
    numbers = 2 * 4 * 2 * 64 * llm.LENGTH * llm.WINDOWS
    rows = []
    model = mini(variant)
    exact = logits(model, x, caches.make_prompt_cache(model))
    nats = -mx.take_along_axis(exact, target, -1).mean().item()
    for name, bits, make in METHODS:
        cache = make(model)
        got = logits(model, x, cache)
        own = -mx.take_along_axis(got, target, -1).mean().item()
        row = {
            "variant": variant, "cache": name, "bits": bits, "perplexity": math.exp(own), "delta": math.exp(own - nats) - 1,
            "kl": (mx.exp(exact) * (exact - got)).sum(-1).mean().item(), "held_bits": 8 * sum(c.nbytes for c in cache) / numbers,
        }  # fmt: skip
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def long_prompt(tokens: int = 4096, count: int = 20) -> list[dict[str, Any]]:
    """A random model of 8 layers, 4 heads of 64, fp32: most memory while the prompt is read 128 at a time, CPU ms a token after."""
    mx.random.seed(0)
    args = qwen2.ModelArgs("qwen2", 256, 8, 128, 4, 1e-6, 128, 4, rope_theta=10000.0, tie_word_embeddings=False)
    model = qwen2.Model(args)
    mx.eval(model.parameters())
    ids = mx.random.randint(1, 128, (tokens,))
    runs: list[tuple[str, Callable[[], list[Any]]]] = [
        ("exact", lambda: caches.make_prompt_cache(model)),
        (OWN, lambda: [caches.QuantizedKVCache(64, 4) for _ in model.layers]),
        ("tqai", lambda: make_prompt_cache(model)),
    ]
    rows = []
    for name, make in runs:
        cache = make()
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        steps = generate_step(ids, model, prompt_cache=cache, max_tokens=count + 1, prefill_step_size=128)
        next(steps)
        peak, began = mx.get_peak_memory() - before, time.process_time()
        list(steps)
        ms = 1e3 * (time.process_time() - began) / count
        rows.append({"cache": name, "peak_mib": peak / 2**20, "held_mib": sum(c.nbytes for c in cache) / 2**20, "ms": ms})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    file, parts = Path(sys.argv[1]), sys.argv[2:] or ["long", *minis.LM_VARIANTS]
    result = json.loads(file.read_text()) if file.exists() and len(sys.argv) > 2 else {"long": [], "quality": []}
    result |= {"bench": "mlx", "machine": machine() | {"mlx": mx.__version__}}
    for part in parts:
        if part == "long":
            result["long"] = long_prompt()
        else:
            result["quality"] = [row for row in result["quality"] if row["variant"] != part] + quality(part)
    file.write_text(json.dumps(result, indent=1) + "\n")
