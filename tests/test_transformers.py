"""KVCache in real models of transformers: a random Qwen2 of many heads, hybrids, and the trained mini."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tqai_core as tqai
from tqai_core import minis
from tqai_core.attention.lazy import LazyKV

sys.path.append(str(Path(__file__).parent))
import tiny_lms

SMALL = dict(
    vocab_size=128, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
KV = tqai.Config(level="kv", codec="turbo:bits_k=4,bits_v=4", sink=2, recent=8, calibrate=32)


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval()
    for p in model.parameters():  # sharper than at initialisation: fewer ties
        if p.ndim > 1:
            p.data *= 2.5
    return model


@pytest.fixture(scope="module")
def mini():
    return minis.lm()


@pytest.fixture(scope="module")
def text():
    return minis.lm_text()


def prompt(batch=2, length=70, vocab=128, seed=0):
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, config, ids, fused, **kw):
    """Tokens and cache of a generation; nothing is left patched. Not ``fused``: by transformers' attention that makes dense values."""
    was = model.config._attn_implementation
    handle = tqai.apply(model, config) if fused else None
    if not fused:
        model.set_attn_implementation("eager")
    cache = handle.cache() if handle else tqai.KVCache(model.config, config)
    kw = {"max_new_tokens": 50, "do_sample": False, **kw}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.generate(ids, past_key_values=cache, **kw), cache
        finally:
            if handle:
                handle.remove()
            model.set_attn_implementation(was)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return mask


MODES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.8),
    "beam": dict(num_beams=3),
    "returns": dict(num_beams=4, num_return_sequences=2),
    "sampled returns": dict(do_sample=True, num_return_sequences=3),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "chunked prefill": dict(prefill_chunk_size=16),
    "left padding": {},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["random", "mini"])
def test_fused_tokens_are_those_of_the_dense_path(which, mode, qwen, mini, text):
    model = qwen if which == "random" else mini
    ids = prompt() if which == "random" else torch.stack([text[:300], text[5000:5300]])
    config = KV if which == "random" else tqai.Config(level="kv", recent=32)
    kw = dict(MODES[mode])
    if mode == "prompt lookup":
        ids = ids[:1]
    if mode == "left padding":
        kw["attention_mask"] = padded(ids)
    fused, cache = run(model, config, ids, True, **kw)
    dense, other = run(model, config, ids, False, **kw)
    assert torch.equal(fused, dense)
    assert cache.materialised == 0
    assert other.materialised > 0
    assert cache.get_seq_length() == other.get_seq_length()
    assert all(layer.kv.packed > 0 for layer in cache.packed_layers)


def test_assisted_generation(qwen):
    ids = prompt(1)
    assistant = copy.deepcopy(qwen)
    assistant.model.layers = assistant.model.layers[:1]
    assistant.config.num_hidden_layers = 1
    assistant.config.layer_types = assistant.config.layer_types[:1]
    fused, cache = run(qwen, KV, ids, True, assistant_model=assistant)
    dense, _ = run(qwen, KV, ids, False, assistant_model=assistant)
    assert torch.equal(fused, dense)
    assert cache.materialised == 0


def test_eager_reads_dense_values_and_sees_the_same_statistics(mini, text):
    ids = text[None, :300]
    fused, cache = run(mini, tqai.Config(level="kv"), ids, True)
    eager, other = run(mini, tqai.Config(level="kv"), ids, False)
    assert torch.equal(fused, eager)
    for a, b in zip(cache.packed_layers, other.packed_layers, strict=True):
        assert torch.allclose(a.kv.statistics.scale, b.kv.statistics.scale, rtol=1e-3)
        assert float(b.kv.statistics.scale.max()) > 1.1


def test_exact_where_nothing_is_packed_yet(qwen):
    ids = prompt(length=40)
    exact = qwen.generate(ids, max_new_tokens=30, do_sample=False)
    fused, cache = run(qwen, tqai.Config(level="kv"), ids, True, max_new_tokens=30)
    assert torch.equal(fused, exact)
    assert "packing starts at 256" in cache.report().warnings[0]


@pytest.mark.parametrize("mode", ["greedy", "beam", "chunked prefill", "left padding"])
def test_sdpa_reads_a_bare_cache_in_place(qwen, mode):
    """Without apply: the tokens of the fused run, by logits within rounding, and no dense value is made."""
    ids = prompt()
    kw = {**MODES[mode], **({"attention_mask": padded(ids)} if mode == "left padding" else {})}
    fused, _ = run(qwen, KV, ids, True, **kw)
    cache = tqai.KVCache(qwen.config, KV)
    assert qwen.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if mode == "chunked prefill" else "error")
        bare = qwen.generate(ids, past_key_values=cache, max_new_tokens=50, do_sample=False, **kw)
    assert torch.equal(bare, fused)
    assert cache.packed_layers[0].kv.packed > 0
    assert (cache.materialised == 0) == (mode != "chunked prefill"), "a chunk repeats the heads of its keys, which needs dense ones"


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("masked", ["none", "bool", "added"])
def test_sdpa_on_views_is_sdpa_on_dense_values(groups, masked):
    layer = tqai.KVCache(Qwen2Config(**SMALL), tqai.Config(level="kv", calibrate=0, recent=8)).packed_layers[0]
    layer.update(torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16))
    k, v = layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    q, mask = torch.randn(2, 2 * groups, 1, 16), torch.rand(2, 1, 1, 91) > 0.3
    given = {"none": None, "bool": mask, "added": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}[masked]
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=given, enable_gqa=groups > 1)
    got = sdpa(q, k, v)
    assert layer.kv.decoded == 0
    dense = layer.kv.dense("k"), layer.kv.dense("v")
    torch.testing.assert_close(got, sdpa(q, *dense), rtol=2e-4, atol=2e-5)
    query = q.clone().requires_grad_(True)
    with pytest.warns(UserWarning, match="dense keys and values"):
        sdpa(query, k, v).sum().backward()
    assert query.grad is not None, "where a gradient is wanted, values are dense"
    assert query.grad.abs().sum() > 0


def test_another_attention_is_told_once(qwen, monkeypatch):
    monkeypatch.setattr(qwen.config, "_attn_implementation_internal", "eager")
    cache = tqai.KVCache(qwen.config, KV)
    with pytest.warns(UserWarning, match=r"tqai\.apply\(model, config\)") as seen:
        qwen.generate(prompt(), past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert len([w for w in seen if "tqai" in str(w.message)]) == 1
    report = cache.report()
    assert len(report.warnings) == 1
    assert report.per_site["attn.0"]["materialised"] > 0


def test_views_have_no_storage(qwen):
    cache = tqai.KVCache(qwen.config, KV)
    k, v = cache.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16), 0)
    k, v = cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    assert isinstance(k, LazyKV)
    assert k.shape == (1, 2, 61, 16)
    assert k.dtype == torch.float32
    assert "LazyKV" in repr(v)
    with pytest.warns(UserWarning, match="dense"):
        assert torch.equal(k + 0, cache.layers[0].kv.dense("k"))


# -- the patch


def test_apply_and_remove_leave_the_model_as_it_was(qwen):
    ids = prompt()
    before, was = qwen(ids).logits, qwen.config._attn_implementation
    with tqai.apply(qwen, KV) as handle:
        assert qwen.config._attn_implementation == "tqai"
        assert torch.equal(qwen(ids).logits, before), "without a packed cache our attention is torch's own"
        assert handle.report().warnings
    assert qwen.config._attn_implementation == was
    assert torch.equal(qwen(ids).logits, before)
    handle.remove()


@pytest.mark.parametrize("first", [0, 1])
def test_the_last_of_two_handles_restores_the_attention(first, qwen):
    was = qwen.config._attn_implementation
    handles = [tqai.apply(qwen, KV), tqai.apply(qwen, KV)]
    handles.pop(first).remove()
    assert qwen.config._attn_implementation == "tqai", "the other one still lives"
    handles.pop().remove()
    assert qwen.config._attn_implementation == was


def test_a_deep_copy_of_a_cache_counts_for_itself(qwen):
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(prompt(), past_key_values=cache)
        other = copy.deepcopy(cache)
        qwen(prompt(length=1), past_key_values=other)
    assert (cache.report().evaluations, other.report().evaluations) == (1, 2)
    assert (cache.report().calls, other.report().calls) == (3, 6)
    assert other.report().per_site["attn.0"]["tokens"] == 71


def test_the_handle_counts_and_reports(qwen):
    handle = tqai.apply(qwen, KV)
    cache = handle.cache()
    qwen.generate(prompt(), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert handle.nbytes == cache.nbytes > 0
    report = handle.report()
    handle.remove()
    assert report.evaluations == 20
    assert report.calls == 60
    assert report.calls_skipped == 0
    assert report.bytes_held_peak >= cache.nbytes
    assert report.bytes_exact == 3 * 2 * 2 * 2 * 89 * 16 * 2  # layers, k and v, batch, heads, tokens, channels, fp16
    site = report.per_site["attn.2"]
    assert site["tokens"] == 89
    assert site["bits_k"] == 4
    assert site["materialised"] == 0
    json.loads(report.to_json())
    assert "held at the peak" in report.to_markdown()
    cache.reset()
    assert cache.report().evaluations == 0
    assert cache.nbytes == 0


def test_edge_layers_have_eight_bits_and_skipped_ones_are_exact():
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 16})
    cache = tqai.KVCache(config, tqai.Config(level="kv", codec="turbo", protect=2, skip_layers=(5, -2)))
    bits = [layer.kv.plan.bits_k if hasattr(layer, "kv") else 16 for layer in cache.layers]
    assert bits == [8, 8, 4, 4, 4, 16, 4, 4, 4, 4, 4, 4, 4, 4, 16, 8]
    assert {f["where"] for f in cache.report().fallbacks} == {"attn.5", "attn.14"}
    none = tqai.KVCache(config, tqai.Config(level="kv", codec="turbo"))
    assert {layer.kv.plan.bits_k for layer in none.layers} == {4}


def test_hybrids_keep_their_own_layers():
    torch.manual_seed(0)
    config = Gemma2Config(**{**SMALL, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 24})
    model = Gemma2ForCausalLM(config).eval()
    ids = prompt()
    model.set_attn_implementation("eager")
    exact = model.generate(ids, max_new_tokens=30, do_sample=False)
    with tqai.apply(model, tqai.Config(level="kv", codec="turbo:bits=8", recent=8, calibrate=32)) as handle:
        cache = handle.cache()
        kinds = [type(layer).__name__ for layer in cache.layers]
        packed = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert kinds == ["DynamicSlidingWindowLayer", "PackedLayer"] * 2
    assert cache.materialised == 0
    assert (packed == exact).float().mean() > 0.95, "softcapped scores at 8 bits"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models(qwen, dtype):
    model = copy.deepcopy(qwen).to(dtype)
    ids = prompt()
    fused, cache = run(model, KV, ids, True)
    assert cache.materialised == 0
    assert cache.layers[0].kv.keys.dtype == dtype
    exact = model(fused).logits
    with tqai.apply(model, tqai.Config(level="kv", codec="turbo:bits=8", recent=8, calibrate=32)) as handle:
        cache = handle.cache()
        model(fused[:, :80], past_key_values=cache)
        packed = model(fused[:, 80:], past_key_values=cache).logits
    assert F.kl_div(packed.log_softmax(-1).float(), exact[:, 80:].log_softmax(-1).float(), log_target=True, reduction="batchmean") < 0.2


def test_training_through_the_cache_is_warned_about(qwen):
    model = copy.deepcopy(qwen).train()
    with tqai.apply(model, KV) as handle, pytest.warns(UserWarning, match="no gradient"):
        model(prompt(), past_key_values=handle.cache())


# -- files


def test_a_cache_on_disk_is_continued(qwen, tmp_path):
    ids, path = prompt(), tmp_path / "prompt.safetensors"
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(ids, past_key_values=cache)
        cache.save(path)
        more = torch.cat([ids, prompt(length=5, seed=9)], dim=1)
        straight = qwen.generate(more, past_key_values=cache, max_new_tokens=30, do_sample=False)
        again = handle.load(path)
        assert again.nbytes < path.stat().st_size
        assert torch.equal(qwen.generate(more, past_key_values=again, max_new_tokens=30, do_sample=False), straight)
    assert path.stat().st_size < 0.6 * sum(layer.keys.nbytes * 2 for layer in _exact(qwen, ids).layers)


def _exact(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return cache


def test_files_of_other_models_and_damaged_ones(qwen, tmp_path):
    path = tmp_path / "cache.safetensors"
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(prompt(), past_key_values=cache)
        cache.save(path)
    other = Qwen2Config(**{**SMALL, "num_key_value_heads": 3})
    with pytest.raises(ValueError, match="num_key_value_heads=2"):
        tqai.KVCache.load(path, other)
    twin = Qwen2ForCausalLM(qwen.config).eval()
    with tqai.apply(twin, KV) as handle, pytest.raises(ValueError, match="other weights"):
        handle.load(path)
    blob = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match="not a readable cache file"):
        tqai.KVCache.load(tmp_path / "cut.safetensors", qwen.config)
    tqai.codec("turbo").encode(torch.randn(4, 64)).write(tmp_path / "tensor.safetensors")
    with pytest.raises(ValueError, match="tqai-kv"):
        tqai.KVCache.load(tmp_path / "tensor.safetensors", qwen.config)
    with pytest.raises(ValueError, match="not a readable"):
        tqai.KVCache.load(tmp_path / "absent.safetensors", qwen.config)


# -- bad input


def test_a_cache_is_bound_to_its_model_and_batch(qwen):
    twin = copy.deepcopy(qwen)
    with tqai.apply(qwen, KV) as one, tqai.apply(twin, KV):
        cache = one.cache()
        qwen(prompt(), past_key_values=cache)
        with pytest.raises(ValueError, match="another model or batch"):
            qwen(prompt(batch=3, length=1), past_key_values=cache)
        with pytest.raises(ValueError, match="another model"):
            twin(prompt(length=1), past_key_values=cache)
        cache.reset()
        twin(prompt(batch=3), past_key_values=cache)
    cache = tqai.KVCache(qwen.config, KV)
    with pytest.raises(ValueError, match="another model's config"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 3)


def test_crop_beyond_what_is_kept(qwen):
    cache = tqai.KVCache(qwen.config, KV)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwen(prompt(), past_key_values=cache)
    with pytest.raises(ValueError, match="keeps 70"):
        cache.crop(-71)
    assert cache.get_seq_length() == 70
    cache.crop(-30)
    assert cache.get_seq_length() == 40
    cache.crop(20)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: tqai.KVCache(Qwen2Config(**{**SMALL, "hidden_size": 120})), ["20", "multiple of 8"]),
        (lambda: tqai.KVCache(GPT2Config(n_embd=64, n_head=4, n_layer=2)), ["gpt2", "rotary", "calibrate=0"]),
        (lambda: tqai.KVCache(Qwen2Config(**SMALL), tqai.Config()), ["level='kv'", "model"]),
        (lambda: tqai.KVCache(None), ["model.config"]),
        (lambda: tqai.KVCache(Qwen2Config(**SMALL), tqai.Config(level="kv", skip_layers=(7,))), ["7", "0 to 2"]),
        (lambda: tqai.KVCache(Qwen2Config(**SMALL), tqai.Config(level="kv", codec="turbo:bits=7")), ["7", "2, 3, 4, 5, 6, 8"]),
        (lambda: tqai.Config(level="kv", codec="turbo:bits_k=7"), ["bits_k=7", "2, 3, 4, 5, 6, 8"]),
        (lambda: tqai.Config(level="kv", codec="trellis"), ["trellis", "kv"]),
        (lambda: tqai.Config(level="kv", recent=-1), ["recent=-1"]),
        (lambda: tqai.Config(recent=3), ["recent", "kv"]),
        (lambda: tqai.Config(codec="turbo:bits_v=2"), ["bits_v", "kv"]),
        (lambda: tqai.apply(Qwen2ForCausalLM(Qwen2Config(**SMALL)), tqai.Config()), ["level='kv'"]),
        (lambda: tqai.preset("k5v5"), ["k5v5", "k4v4"]),
    ],
)
def test_bad_input_says_what_and_the_cure(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_a_model_without_rotary_positions_works_unscaled():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=128, bos_token_id=None, eos_token_id=None)).eval()
    config = tqai.Config(level="kv", calibrate=0, recent=8)
    fused, cache = run(model, config, prompt(), True, pad_token_id=0)
    dense, _ = run(model, config, prompt(), False, pad_token_id=0)
    assert torch.equal(fused, dense)
    assert cache.materialised == 0
    assert cache.layers[0].kv.packed > 0


def test_nan_keys_are_reported_and_held_exact(qwen):
    model = copy.deepcopy(qwen)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with tqai.apply(model, KV) as handle:
        cache = handle.cache()
        model(prompt(), past_key_values=cache)
    fallback = {f["where"]: f["why"] for f in cache.report().fallbacks}
    assert "NaN" in fallback["attn.1"]
    assert "attn.0" not in fallback
    assert cache.layers[1].kv.packed == 0
    assert cache.layers[0].kv.packed > 0


# -- config


def test_level_kv_in_every_spelling():
    config = tqai.Config(level="kv", codec="turbo:bits_k=8,bits_v=2", recent=32, sink=0, protect=0)
    assert tqai.Config.from_json(config.to_json()) == config
    assert config.strategy is None
    assert config.monitor is None
    again = tqai.Config.from_dict(
        {"level": "kv", "codec": "turbo", "codec_kwargs": {"bits_k": 8, "bits_v": 2}, "recent": 32, "sink": 0, "protect": 0}
    )
    assert again == config
    for name in ("k8v4", "k6v4", "k5v4", "k5v3", "k4v4", "k4v3", "k4v2", "k3v2", "k2v2"):
        plan = tqai.KVCache(Qwen2Config(**SMALL), tqai.preset(name)).layers[0].kv.plan
        assert f"k{plan.bits_k}v{plan.bits_v}" == name
    exact = tqai.KVCache(Qwen2Config(**SMALL), tqai.Config(level="kv", codec="exact"))
    assert [type(layer).__name__ for layer in exact.layers] == ["DynamicLayer"] * 3


def test_llama_needs_no_config():
    config = LlamaConfig(**SMALL)
    model = LlamaForCausalLM(config).eval()
    with tqai.apply(model) as handle:
        out = model.generate(prompt(1, 300), past_key_values=handle.cache(), max_new_tokens=40, do_sample=False)
        assert handle.report().per_site["attn.1"]["tokens_packed"] > 200
    assert out.shape == (1, 340)


# -- the trained mini


def test_the_mini_reads_bytes(mini, text):
    folder = Path(minis.__file__).parent
    log = json.loads((folder / "lm.json").read_text())
    assert (folder / "lm.safetensors").stat().st_size <= 7e6
    assert log["files"]
    assert len(log["text_sha256"]) == 64
    windows = text[: 16 * 513].view(16, 513)
    nats = F.cross_entropy(mini(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert math.exp(nats) <= 4.2
    assert log["perplexity_512"] <= 4.2
    with pytest.raises(ValueError, match="plain, outlier, bias"):
        minis.lm("hard")


@pytest.mark.parametrize("variant", ["outlier", "bias"])
def test_the_variants_compute_the_same_function(variant, mini, text):
    other = minis.lm(variant)
    x = text[None, :300]
    a, b = mini(x).logits.log_softmax(-1), other(x).logits.log_softmax(-1)
    assert float((a.exp() * (a - b)).sum(-1).mean()) < (1e-6 if variant == "outlier" else 2e-3)
    k, plain = _exact(other, x).layers[2].keys, _exact(mini, x).layers[2].keys
    assert float(k.abs().max()) > 2.5 * float(plain.abs().max()), "and has keys that are hard to code"


@pytest.mark.parametrize("bits, limit", [(4, 0.003), (2, 0.012)])
def test_perplexity_survives_in_every_variant(bits, limit, text):
    """The promise of the key transform: outlier channels and biases change nothing."""
    x = text[: 4 * 640].view(4, 640)
    for variant in minis.LM_VARIANTS:
        model = minis.lm(variant)
        exact = F.cross_entropy(model(x[:, :-1]).logits[:, 320:].flatten(0, 1), x[:, 321:].flatten())
        config = tqai.Config(level="kv", codec=f"turbo:bits={bits}", recent=32)
        with tqai.apply(model, config) as handle:
            cache, out = handle.cache(), []
            model(x[:, :320], past_key_values=cache)
            for at in range(320, 639, 29):
                out.append(model(x[:, at : at + 29], past_key_values=cache).logits)
        packed = F.cross_entropy(torch.cat(out, 1)[:, :319].flatten(0, 1), x[:, 321:].flatten())
        assert cache.materialised == 0
        assert cache.layers[0].kv.packed > 500
        assert abs(float(packed - exact)) < limit, variant


# -- left padding


def pads_cost(lm, text, pads, bits):
    """KL of a batch whose sequences begin with so many tokens of padding, over the KL of each of them alone."""
    config = tqai.Config(level="kv", codec={"name": "turbo", "bits_k": bits, "bits_v": bits}, recent=32, protect=0)
    tokens, seen = 480, torch.ones(len(pads), 480 + max(pads), dtype=torch.long)
    ids = torch.zeros_like(seen)
    for i, count in enumerate(pads):
        ids[i, count:] = text[9000 * i : 9000 * i + seen.shape[1] - count]
        seen[i, :count] = 0
    first = seen.shape[1] - tokens

    def logits(ids, mask, cache, first):
        cuts = [(0, first + 320), *((at, at + 40) for at in range(first + 320, first + tokens, 40))]
        at = (mask.cumsum(1) - 1).clamp_min(0)
        out = [lm(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b], past_key_values=cache).logits for a, b in cuts]
        return torch.cat(out[1:], 1).log_softmax(-1)

    def kl(ids, mask, first):
        exact = logits(ids, mask, DynamicCache(config=lm.config), first)
        with tqai.apply(lm, config) as handle:
            got = logits(ids, mask, handle.cache(), first)
        return (exact.exp() * (exact - got)).sum((1, 2))

    alone = torch.cat([kl(ids[i : i + 1, count:], seen[i : i + 1, count:], first - count) for i, count in enumerate(pads)])
    return float(kl(ids, seen, first).sum() / alone.sum())


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("pads", [[8] * 3, [64] * 3, [500] * 3, [1500] * 3, [0, 8, 64, 500]], ids=str)
def test_left_padding_costs_nothing(bits, pads, mini, text):
    assert pads_cost(mini, text, pads, bits) <= 1.3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bare_cache_learns_of_padding_from_the_mask_it_meets(attention, qwen):
    ids = prompt()
    mask = padded(ids)
    _, ours = run(qwen, KV, ids, True, attention_mask=mask)
    was = qwen.config._attn_implementation
    qwen.set_attn_implementation(attention)
    try:
        _, bare = run(qwen, KV, ids, False, attention_mask=mask)
    finally:
        qwen.set_attn_implementation(was)
    for a, b in zip(ours.packed_layers, bare.packed_layers, strict=True):
        assert a.kv.pads.tolist() == b.kv.pads.tolist() == [9, 0]
        assert torch.allclose(a.kv.statistics.scale, b.kv.statistics.scale, rtol=1e-4)


def test_sinks_and_dense_rows_of_a_padded_batch_are_the_real_tokens(qwen):
    ids = prompt()
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(ids, attention_mask=padded(ids), past_key_values=cache)
        exact = DynamicCache(config=qwen.config)
        qwen(ids, attention_mask=padded(ids), past_key_values=exact)
    for layer, other in zip(cache.packed_layers, exact.layers, strict=True):
        kv = layer.kv
        assert kv.packed
        dense = kv.dense("k").detach()
        assert torch.equal(kv.keys[0, :, :2], other.keys[0, :, 9:11]), "sinks"
        assert torch.equal(dense[0, :, 9:11], other.keys[0, :, 9:11]), "at their own positions"
        assert torch.equal(dense[1, :, :2], other.keys[1, :, :2])
        assert torch.equal(dense[:, :, -8:], other.keys[:, :, -8:])
        assert float((dense[0, :, 9:] - other.keys[0, :, 9:]).norm() / other.keys[0, :, 9:].norm()) < 0.2
        assert not dense[0, :, :9].sub(kv.statistics.mean[0]).abs().max() > 1e-4, "padding is stored as nothing"


def test_a_padded_cache_is_cropped_selected_and_saved(qwen, tmp_path):
    ids = prompt()
    mask, more = padded(ids), torch.ones(2, 5, dtype=torch.long)
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(ids, attention_mask=mask, past_key_values=cache)
        cache.save(tmp_path / "padded.safetensors")
        want = qwen(ids[:, :5], attention_mask=torch.cat([mask, more], 1), past_key_values=copy.deepcopy(cache)).logits
        again = handle.load(tmp_path / "padded.safetensors")
        assert torch.equal(qwen(ids[:, :5], attention_mask=torch.cat([mask, more], 1), past_key_values=again).logits, want)
        one = copy.deepcopy(cache)
        one.batch_select_indices(torch.tensor([0]))
        got = qwen(ids[:1, :5], attention_mask=torch.cat([mask, more], 1)[:1], past_key_values=one).logits
        assert torch.allclose(got, want[:1], atol=1e-4)
        dense = cache.layers[0].kv.dense("k")
        for left in (60, 12, 10, 5):
            cache.crop(left)
            kv = cache.layers[0].kv
            assert kv.length == left
            assert torch.allclose(kv.dense("k")[1], dense[1, :, :left], atol=1e-5)
            assert kv.pads.tolist() == [min(9, left), 0]


# -- refused in a sentence, or right


def test_a_prompt_with_no_new_token_says_what_the_cache_keeps(qwen):
    cache = tqai.KVCache(qwen.config, KV)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwen.generate(prompt(1), past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(tqai.TqaiError, match=r"keeps 74 tokens .* cache\.reset\(\)"):
        qwen.generate(prompt(1, 20), past_key_values=cache, max_new_tokens=5, do_sample=False)


def test_a_positive_crop_reaches_layers_of_every_kind():
    config = Gemma2Config(**{**SMALL, "head_dim": 16, "sliding_window": 200})
    cache = tqai.KVCache(config, KV)
    Gemma2ForCausalLM(config).eval()(prompt(1, 20), past_key_values=cache)
    cache.crop(12)
    assert [layer.get_seq_length() for layer in cache.layers] == [12, 12, 12]
    layer = cache.packed_layers[0]
    for count, left in ((10, 10), (11, 10), (-3, 7)):
        layer.crop(count)
        assert layer.get_seq_length() == left, "of one layer too, as older transformers ask it"


def test_a_cache_goes_through_pickle_and_torch_save(qwen, tmp_path):
    ids = prompt()
    with tqai.apply(qwen, KV) as handle:
        cache = handle.cache()
        qwen(ids, past_key_values=cache)
        torch.save(cache, tmp_path / "cache.pt")
        others = [pickle.loads(pickle.dumps(cache)), torch.load(tmp_path / "cache.pt", weights_only=False)]
        want = qwen(ids[:, :1], past_key_values=cache).logits
        for other in others:
            assert torch.equal(qwen(ids[:, :1], past_key_values=other).logits, want)


def test_export_with_a_cache_inside_is_refused(qwen):
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = qwen

        def forward(self, ids):
            return self.model(ids, past_key_values=tqai.KVCache(qwen.config, KV)).logits

    with pytest.raises(tqai.TqaiError, match=r"torch\.export .* DynamicCache"):
        torch.export.export(Inside(), (prompt(),), strict=False)


def test_flex_attention_gets_plain_tensors(qwen):
    was = qwen.config._attn_implementation
    cache = tqai.KVCache(qwen.config, KV)
    qwen.config._attn_implementation_internal = "flex_attention"
    try:
        k, v = cache.update(torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16), 0)
    finally:
        qwen.config._attn_implementation_internal = was
    assert type(k) is type(v) is torch.Tensor


def test_mpt_past_its_length_says_how_many_positions_it_has():
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128)
    cache = tqai.KVCache(config, tqai.Config(level="kv", calibrate=0))
    with pytest.raises(tqai.TqaiError, match="mpt has positions for 64 tokens, 70 are asked"):
        MptForCausalLM(config).eval()(prompt(1), past_key_values=cache)


def test_layers_that_share_keys_take_them_from_one_packed_layer():
    """Gemma 3n: packed at 8 bits nearly the tokens of the exact cache, and nothing is decoded."""
    model = tiny_lms.build("gemma3n_text")
    ids = prompt(2, 70, 90)
    config = tqai.Config(level="kv", codec="turbo:bits=8", recent=8, calibrate=32)
    with torch.no_grad(), tqai.apply(model, config) as handle:
        cache = handle.cache()
        model(ids[:, :60], past_key_values=cache)
        got = model(ids[:, 60:], past_key_values=cache).logits.log_softmax(-1)
        exact = DynamicCache(config=model.config)
        model(ids[:, :60], past_key_values=exact)
        want = model(ids[:, 60:], past_key_values=exact).logits.log_softmax(-1)
    assert any(layer.kv.packed for layer in cache.packed_layers)
    assert cache.materialised == 0
    assert float(F.kl_div(got, want, log_target=True, reduction="sum") / ids[:, 60:].numel()) < 0.05
