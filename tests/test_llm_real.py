"""The bench on a real language model: what it keeps, what it measures, on which texts. The model itself is made by `make real-lm`."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bench import llm_real, real_texts
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tqai_core as tqai

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def exact():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, initializer_range=0.2,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval().requires_grad_(False)
    return llm_real.Exact.read(lm, torch.randint(0, 128, (2, 512)))


def test_the_exact_cache_scores_zero_and_more_bits_less(exact, monkeypatch):
    monkeypatch.setitem(llm_real.SCORED, 512, 128)
    lm, before = exact.lm, exact.lm.config._attn_implementation
    none = llm_real.score(exact, lambda: DynamicCache(config=lm.config))
    assert abs(none["kl"]) < 1e-6
    assert abs(none["delta"]) < 1e-5
    assert none["top1"] == 1
    assert none["held_bits"] == 32
    rows = [llm_real.score(exact, tqai.preset(name)) for name in ("k8v4", "k4v4", "k2v2")]
    assert rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
    assert rows[0]["held_bits"] > rows[1]["held_bits"] > rows[2]["held_bits"]
    assert lm.config._attn_implementation == before


def test_a_filled_cache_is_the_one_that_a_prefill_fills(exact):
    config = tqai.preset("k4v4")
    with tqai.apply(exact.lm, config) as handle, torch.no_grad():
        one, two = handle.cache(), handle.cache()
        exact.lm(exact.ids[:, :400], past_key_values=one)
        exact.fill(two, 400)
    for a, b in zip(one.packed_layers, two.packed_layers, strict=True):
        for which in "kv":
            x, y = a.kv.dense(which), b.kv.dense(which)
            assert (x - y).square().mean() / x.square().mean() < 1e-4  # a rounding may turn a code


def test_rows_are_kept_until_their_code_changes(tmp_path):
    asked = []

    def measure():
        asked.append(1)
        return {"kl": float(len(asked))}

    for code, expected in (("a", 1.0), ("a", 1.0), ("b", 2.0)):
        row = llm_real.Kept.load(tmp_path / "rows.json").get("one", code, measure)
        assert row["kl"] == expected
        assert "code" not in row
    one, two = (llm_real.Kept.load(tmp_path / "rows.json") for _ in range(2))  # two runs at once lose no row of each other
    one.get("left", "a", lambda: {"kl": 0.0})
    two.get("right", "a", lambda: {"kl": 0.0})
    assert llm_real.Kept.load(tmp_path / "rows.json").rows.keys() == {"one", "left", "right"}


def test_texts_of_the_choice_and_of_the_verdict_are_apart_and_known():
    texts = (*real_texts.CHOICE, *real_texts.VERDICT)
    assert len({text.name for text in texts}) == len({text.path for text in texts}) == len(texts) >= 8
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    missing = real_texts.missing(texts)
    for text in texts:
        if text.package in pinned and version(text.package).split("+")[0] == pinned[text.package]:
            assert text.name not in missing
            assert len(text.read()) > 50_000


def test_another_wheel_is_not_unpacked(tmp_path):
    spec = importlib.util.spec_from_file_location("real_lm", ROOT / "benchmarks/real_lm.py")
    real_lm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_lm)
    (tmp_path / "x.whl").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="expected"):
        real_lm.make(tmp_path / "out", tmp_path / "x.whl")
    assert not (tmp_path / "out").exists()


def test_without_the_model_the_bench_says_how_to_make_it(tmp_path):
    with pytest.raises(tqai.TqaiError, match="make real-lm"):
        llm_real.bench(str(tmp_path))
