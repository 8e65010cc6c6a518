"""Scorers, strategies and monitors at level kv: every triple, what each one decides, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tqai_core as tqai
from tqai_core.attention import native
from tqai_core.attention.tiers import attend
from tqai_core.kv import PackedKV, Plan
from tqai_core.kv_methods import policy
from tqai_core.registry import REGISTRY, build, names
from tqai_core.types import nbytes

SMALL = dict(
    vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
BASE = dict(level="kv", codec="turbo:bits=2", sink=2, recent=8, calibrate=32)


def methods(role, fisher_file):
    """Whatever the registry has, and none."""
    return [None, *(f"fisher:file={fisher_file}" if name == "fisher" else name for name in names(role))]


def works(role, spec):
    return spec is None or "kv" in REGISTRY[role][spec.partition(":")[0]].levels


@pytest.fixture(scope="module")
def kv_fisher(tmp_path_factory):
    """A table of two layers: values of layer 1 are the sensitive ones."""
    from safetensors.torch import save_file

    table = torch.ones(2, 2, 2, 1)
    table[1, :, 1] *= 10
    path = tmp_path_factory.mktemp("fisher") / "kv.safetensors"
    save_file({"fisher": table, "sigmas": torch.tensor([0.5])}, str(path))
    return str(path)


def make(seed=0):
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 2.5
    return model


@pytest.fixture(scope="module")
def qwen():
    return make()


@pytest.fixture(scope="module")
def qwens(qwen):
    return {dtype: copy.deepcopy(qwen).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def prompt(batch=2, length=70, seed=0):
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def spoken(batch, n, h=2, d=32, seed=0):
    """Keys that drift slowly, as those of text do, and plain values."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, h, n, d, generator=g) * 0.5 + torch.randn(batch, h, n // 16 + 1, d, generator=g).repeat_interleave(16, 2)[:, :, :n]
    return k, torch.randn(batch, h, n, d, generator=g), torch.randn(batch, 2 * h, n, d, generator=g)


def filled(n=400, batch=2, d=32, seed=0, data=None, codec="turbo:bits=2", recent=32, piece=None, **stages):
    config = tqai.Config(level="kv", codec=codec, sink=4, recent=recent, calibrate=64, **stages)
    turbo = build("codec", codec)
    methods, plan = policy(config, Plan(turbo.bits_k or turbo.bits, turbo.bits_v or turbo.bits, sink=4, recent=recent, calibrate=64), 0, 1)
    kv = PackedKV(plan, methods)
    k, v, q = data or spoken(batch, n, d=d, seed=seed)
    for at in range(0, n, piece or n):
        part = slice(at, at + (piece or n))
        kv.append(k[:, :, part], v[:, :, part])
        kv.observe(q[:, :, part])
        kv.settle()
    return kv, k, v, q


def reference(q, k, v, mask=None, scaling=0.2):
    m, n = k.shape[2], q.shape[2]
    mask = torch.arange(m)[None] <= torch.arange(m - n, m)[:, None] if mask is None else mask
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask, scale=scaling)


def same(q, kv, mask=None, **options):
    """Native, torch and dense agree."""
    want = reference(q, kv.dense("k"), kv.dense("v"), mask)
    for way in (True, False):
        got = attend(q, kv, scaling=0.2, mask=mask, native=way, **options)
        assert torch.allclose(got, want, atol=3e-4), float((got - want).abs().max())


# -- the matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_triple_runs_through_prefill_and_decode(dtype, qwens, kv_fisher):
    """Methods are found in the registry; those that have no meaning here refuse and say why."""
    model, ids, ran = qwens[dtype], prompt(length=180), 0
    exact = qwens[torch.float32](ids).logits[:, 120:].float().log_softmax(-1)
    for scorer, strategy, monitor in itertools.product(*(methods(role, kv_fisher) for role in ("scorer", "strategy", "monitor"))):
        stages = dict(scorer=scorer, strategy=strategy, monitor=monitor)
        if not all(works(role, spec) for role, spec in stages.items()):
            with pytest.raises(ValueError, match=r"at 'kv' \(.*\): give"):
                tqai.Config(**BASE, **stages)
            continue
        with tqai.apply(model, tqai.Config(**BASE, **stages)) as handle:
            cache = handle.cache()
            model(ids[:, :120], past_key_values=cache)
            out = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((120, 175), (175, 176), (176, 179), (179, 180))]
        got = torch.cat(out, 1).float().log_softmax(-1)
        assert got.isfinite().all(), stages
        assert float((exact.exp() * (exact - got)).sum(-1).mean()) < 3, stages
        report, bits = cache.report(), {2, 4}
        assert cache.materialised == 0
        for site in report.per_site.values():
            assert site["tokens"] == 180
            assert site["tokens_packed"] >= 128
            assert min(bits) <= site["bits_k"] <= 8
            assert min(bits) <= site["bits_v"] <= 8
        assert cache.nbytes == nbytes([[vars(s) for s in (*x.kv.segments, *x.kv.fine)] + [vars(x.kv.policy) if x.kv.policy else 0] + [
            x.kv.keys, x.kv.values, x.kv.mean, x.kv.scale, x.kv._q2] for x in cache.layers])  # fmt: skip
        json.loads(report.to_json())
        assert report.to_markdown()
        ran += 1
    kinds = {role: [m for m in methods(role, kv_fisher) if works(role, m)] for role in ("scorer", "strategy", "monitor")}
    assert ran == math.prod(map(len, kinds.values()))
    assert ran >= 6 * 5 * 4
