"""mlx-lm's models on packed prompt caches: a tiny random Qwen2, and the trained mini converted. Skipped without mlx-lm."""

from __future__ import annotations

import copy
import gc
import math

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'tqai-core[mlx]'", exc_type=ImportError)

import mlx.core as mx
from mlx_caches import mini
from mlx_lm.generate import generate_step
from mlx_lm.models import base, qwen2
from mlx_lm.models import cache as caches

import tqai_core as tqai
from tqai_core import minis
from tqai_core.hosts.mlx import PackedKVCache, load_prompt_cache, make_prompt_cache, rows
from tqai_core.hosts.mlx import cache as layer_cache

ORIGINAL = base.quantized_scaled_dot_product_attention


def kv(bits_k=4, bits_v=None, **options):
    codec = {"name": "turbo", "bits_k": bits_k, "bits_v": bits_v or bits_k}
    return tqai.Config(level="kv", codec=codec, **{"sink": 2, "recent": 8, "calibrate": 64, **options})


def tiny(layers=2, d=32, **over):
    mx.random.seed(0)
    args = dict(
        model_type="qwen2", hidden_size=4 * d, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=128, rope_theta=10000.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = qwen2.Model(qwen2.ModelArgs(**{**args, **over}))
    for layer in model.layers:  # sharper than at initialisation, and with key biases
        attn = layer.self_attn
        attn.q_proj.weight, attn.k_proj.weight = attn.q_proj.weight * 4, attn.k_proj.weight * 4
        attn.k_proj.bias = mx.random.normal(attn.k_proj.bias.shape) * 2
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def qwen():
    return tiny()


def tokens(batch=1, length=200, seed=1):
    return mx.array(np.random.default_rng(seed).integers(1, 128, (batch, length)))


def read(model, ids, cache, first=90, step=7):
    """Logits of the tokens after ``first``, read ``step`` at a time."""
    mx.eval(model(ids[:, :first], cache=cache))
    out = []
    for at in range(first, ids.shape[1], step):
        out.append(model(ids[:, at : at + step], cache=cache))
        mx.eval(out[-1], [c.state for c in cache])
    return mx.concatenate(out, 1)


def error(x, exact):
    return float(mx.sqrt((x - exact).square().sum() / exact.square().sum()))


def own(model, bits, group=32):
    """mlx-lm's quantised cache: what ours has to beat at the same bits."""
    return [caches.QuantizedKVCache(group, bits) for _ in model.layers]


# -- rows


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_what_mlx_reads_and_better_than_its_own(bits, monkeypatch):
    mx.random.seed(0)
    codes = mx.random.randint(0, 2**bits, (5, 64)).astype(mx.uint32)
    ones = mx.ones((5, 1))
    assert (mx.dequantize(rows.pack(codes, bits), ones, 0 * ones, group_size=64, bits=bits) == codes).all()
    x = mx.random.normal((1, 2, 300, 128))

    def nmse(parts):
        return float((mx.dequantize(*parts, group_size=64, bits=bits) - x).square().mean())

    ours = nmse(rows.encode(x, bits, mx.float16))
    assert ours < {2: 0.1188, 3: 0.03744, 4: 0.01154}.get(bits, 1), "Max 1960: the best uniform levels that are the same for all groups"
    assert ours < 0.9 * nmse(mx.quantize(x.astype(mx.float16), group_size=64, bits=bits)), "docs/llm.md: at least a tenth less"
    monkeypatch.setattr(rows, "FITS", 0)
    unfitted = nmse(rows.encode(x, bits, mx.float16))
    monkeypatch.undo()
    monkeypatch.setattr(rows, "RANGE", {})
    whole_range = nmse(rows.encode(x, bits, mx.float16))
    monkeypatch.undo()
    assert ours < unfitted, "least squares pay"
    assert ours < whole_range if bits in rows.RANGE else ours == whole_range, "so does the range"
    flat = mx.dequantize(*rows.encode(mx.full((1, 1, 1, 64), 3.5), bits, mx.float16), group_size=64, bits=bits)
    assert (flat == 3.5).all(), "a constant row is exact"


# -- a random model beside its exact cache


def test_packed_logits_are_near_the_exact_ones_and_nearer_with_more_bits(qwen):
    ids = tokens(batch=2)
    exact = read(qwen, ids, caches.make_prompt_cache(qwen))
    errors = {}
    for bits in (2, 4, 8):
        cache = make_prompt_cache(qwen, kv(bits))
        errors[bits] = error(read(qwen, ids, cache), exact)
        assert cache[0].packed >= 64
        assert errors[bits] < error(read(qwen, ids, own(qwen, bits)), exact), "mlx-lm's own of the same bits errs more"
    assert errors[8] < errors[4] / (0.5 * 255 / 15), "the levels are 17 times finer: at least half of that arrives"
    assert errors[4] < errors[2] / 2, "5 times finer, but an error near 1 no longer grows with the step"


def test_until_the_statistics_are_there_everything_is_exact(qwen):
    ids = tokens(length=60)
    cache = make_prompt_cache(qwen, kv(2))
    exact = read(qwen, ids, caches.make_prompt_cache(qwen), first=20)
    assert error(read(qwen, ids, cache, first=20), exact) < 1e-5
    assert cache[0].packed == 0
    assert "packing starts at 64" in cache.report().warnings[0]


def test_a_plain_cache_of_uncalibrated_keys(qwen):
    ids = tokens()
    cache = make_prompt_cache(qwen, kv(8, calibrate=0, sink=0, recent=0))
    exact = read(qwen, ids, caches.make_prompt_cache(qwen))
    assert error(read(qwen, ids, cache), exact) < error(read(qwen, ids, own(qwen, 8)), exact)
    assert cache[0].statistics.mean is None
    assert cache[0].head[0].shape[2] == 0


def test_outlier_keys_and_biases_cost_nothing():
    plain, hard = tiny(), tiny()
    factor = mx.ones((2, 32))
    for pair, by in ((3, 50.0), (9, 20.0)):
        factor[:, pair] = by
        factor[:, pair + 16] = by
    for layer in hard.layers:  # the same function
        q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
        k.weight, k.bias = k.weight * factor.reshape(-1, 1), k.bias * factor.flatten()
        wide = mx.repeat(factor, 2, axis=0)
        q.weight, q.bias = q.weight / wide.reshape(-1, 1), q.bias / wide.flatten()
    ids = tokens()
    exact = read(plain, ids, caches.make_prompt_cache(plain))
    ours = [error(read(model, ids, make_prompt_cache(model, kv(4))), exact) for model in (plain, hard)]
    theirs = error(read(hard, ids, own(hard, 4)), exact)
    assert ours[1] < 1.1 * ours[0]
    assert theirs > 3 * ours[1]


def test_queries_in_blocks_and_masks_of_both_kinds_are_the_same(qwen, monkeypatch):
    ids = tokens(batch=2)
    whole = read(qwen, ids, make_prompt_cache(qwen), first=150, step=50)
    monkeypatch.setattr(layer_cache, "SCORES", 2 * 4 * 200 * 3)
    cache = make_prompt_cache(qwen)
    assert error(read(qwen, ids, cache, first=150, step=50), whole) < 1e-5
    layer, q = cache[0], mx.random.normal((2, 4, 5, 32))
    below = mx.arange(195, 200)[:, None] >= mx.arange(200)[None]
    wanted = layer.attend(q, 0.2, "causal")
    for mask in (below, below[None, None], mx.where(below, 0.0, -1e9), mx.broadcast_to(below, (2, 4, 5, 200))):
        assert error(layer.attend(q, 0.2, mask), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models_keep_their_dtype(dtype):
    model = tiny()
    model.set_dtype(dtype)
    ids = tokens()
    cache = make_prompt_cache(model, kv(8))
    out = read(model, ids, cache)
    assert out.dtype == dtype
    exact, theirs = (read(model, ids, c).astype(mx.float32) for c in (caches.make_prompt_cache(model), own(model, 8)))
    assert error(out.astype(mx.float32), exact) < error(theirs, exact), "mlx-lm's own 8 bits in this dtype err more"
    assert cache[0].keys.parts[1].dtype == dtype
    assert cache[0].tail[0].dtype == dtype


def test_neighbouring_rotary_pairs_are_pooled_as_such():
    model = tiny(rope_traditional=True)
    cache = make_prompt_cache(model, kv(4))
    read(model, tokens(), cache)
    scale = cache[0].statistics.scale.reshape(-1, 16, 2)
    assert mx.allclose(scale[..., 0], scale[..., 1])
    other = make_prompt_cache(tiny(), kv(4))
    read(tiny(), tokens(), other)
    halves = other[0].statistics.scale.reshape(-1, 2, 16)
    assert mx.allclose(halves[:, 0], halves[:, 1])
    assert not mx.allclose(other[0].statistics.scale.reshape(-1, 16, 2)[..., 0], other[0].statistics.scale.reshape(-1, 16, 2)[..., 1])


# -- generation, bytes, peak


def greedy(model, ids, cache, count=40):
    return [int(t) for t, _ in generate_step(ids[0], model, prompt_cache=cache, max_tokens=count)]


def test_generation_reports_and_counts(qwen):
    ids = tokens(length=120)
    exact = greedy(qwen, ids, caches.make_prompt_cache(qwen))
    with tqai.apply(qwen, kv(8)) as handle:
        cache = handle.cache()
        assert greedy(qwen, ids, cache) == exact
        report = handle.report()
    assert handle.report().to_dict() == report.to_dict(), "the report outlives the handle"
    site = report.per_site["attn.1"]
    length = 120 + 40
    assert site["tokens"] in (length, length - 1)
    assert site["tokens_packed"] >= length - 2 - 8 - 32
    assert report.bytes_exact == 2 * 2 * 2 * 32 * site["tokens"] * 2
    arrays = [x for layer in cache for x in (*layer.arrays(), *layer.keys.parts, *layer.values.parts) if x is not None]
    assert cache.nbytes == sum(x.nbytes for x in arrays) <= report.bytes_held_peak
    assert set(report.to_dict()) == set(tqai.Report().to_dict())
    assert report.evaluations > 0
    assert report.seconds_cpu > 0


def test_long_prompts_are_packed_as_they_are_read():
    model = tiny(layers=8, d=64, num_key_value_heads=4, hidden_size=256)
    ids = tokens(length=1536)

    def peak(cache):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        next(generate_step(ids[0], model, prompt_cache=cache, max_tokens=1, prefill_step_size=128))
        return mx.get_peak_memory() - before, sum(c.nbytes for c in cache)

    makers = (
        lambda: make_prompt_cache(model, kv(4, calibrate=256, protect=0)),
        lambda: caches.make_prompt_cache(model),
        lambda: own(model, 4, 64),
    )
    packed, exact, theirs = (peak(make()) for make in makers)
    token = 8 * 2 * 4 * 64 * 4  # bytes of an exact one: layers, k and v, heads, channels, fp32
    assert packed[1] < 1536 * token * 4.5 / 32 + (2 + 8 + 16) * token, "4 bits and 32 a group of 64; sinks, window and what is due"
    assert packed[1] < theirs[1] < exact[1]
    assert packed[0] < theirs[0] + (256 + 128) * token, "above mlx-lm's own are the tokens that the statistics wait for, and a chunk"


def test_held_bits_at_2k_tokens():
    model = tiny(layers=1, d=64)
    cache = make_prompt_cache(model, kv(4, sink=4, recent=32, calibrate=256))
    layer = cache[0]
    for at in range(0, 2048, 512):
        k, v = (mx.random.normal((1, 4, 512, 64)).astype(mx.bfloat16) for _ in range(2))
        layer.update_and_fetch(k, v)
        layer.observe(mx.random.normal((1, 4, 512, 64)))
        layer.settle()
        assert layer.offset == at + 512
    room, exact = 2048, 4 + 32  # tokens
    assert layer.packed == 2048 - exact
    statistics = 2 * 4 * 64 * 32
    assert layer.nbytes * 8 == 2 * 4 * 64 * (room * (4 + (16 + 16) / 64) + exact * 16) + statistics


# -- trim, save, load


def test_trim_forgets_the_last_tokens(qwen):
    ids = tokens(length=150)
    for left in (149, 145, 120, 60, 3, 1):
        cache = make_prompt_cache(qwen, kv(8, calibrate=32))
        read(qwen, ids, cache)
        assert caches.can_trim_prompt_cache(cache)
        assert caches.trim_prompt_cache(cache, 150 - left) == 150 - left
        assert cache[0].offset == left
        held = cache[0].packed + sum(x[0].shape[2] for x in (cache[0].head, cache[0].tail) if x is not None)
        assert held == left
        exact = caches.make_prompt_cache(qwen)
        mx.eval(qwen(ids[:, :left], cache=exact))
        theirs = own(qwen, 8)
        mx.eval(qwen(ids[:, :left], cache=theirs))
        again = tokens(length=90, seed=9)
        wanted = qwen(again, cache=exact)
        assert error(qwen(again, cache=cache), wanted) < error(qwen(again, cache=theirs), wanted), left
    cache = make_prompt_cache(qwen, kv(4))
    read(qwen, ids, cache)
    assert cache[0].trim(1000) == 150
    assert cache[0].empty()
    assert cache[0].nbytes == 0


@pytest.mark.parametrize("length", [30, 150])
def test_saved_and_loaded_it_goes_on_alike(qwen, tmp_path, length):
    file = str(tmp_path / "p.safetensors")
    config = kv(3, 4, sink=3, skip_layers=(1,))
    cache = make_prompt_cache(qwen, config)
    mx.eval(qwen(tokens(length=length), cache=cache))
    caches.save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file, qwen)
    assert [type(c) for c in loaded] == [PackedKVCache, caches.KVCache]
    assert loaded[0].plan == cache[0].plan
    assert loaded.config.codec == config.codec
    assert not hasattr(caches, "PackedKVCache"), "mlx-lm's module is as it was"
    more = tokens(length=80, seed=4)
    assert (qwen(more, cache=loaded) == qwen(more, cache=cache)).all()
    with pytest.raises(ValueError, match="a cache of 2 layers, the model has 3"):
        load_prompt_cache(file, tiny(layers=3))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="save the cache again"):
        load_prompt_cache(tmp_path / "bad.safetensors")
    state = cache[0].state
    state[3][0] += 1
    with pytest.raises(ValueError, match="its arrays hold"):
        PackedKVCache.from_state(state)
    (tmp_path / "deep.safetensors").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match="nested"):
        load_prompt_cache(tmp_path / "deep.safetensors")


@pytest.mark.parametrize(
    "place, change",
    [
        ((0, 2), lambda x: x * float("nan")), ((0, 3), lambda x: x[:, :, :-1]), ((0, 4), lambda x: x * float("inf")),
        ((0, 5), lambda x: None),
        ((1, 0), lambda x: x[..., :-1]), ((1, 1), lambda x: x * float("nan")), ((2, 2), lambda x: x[:, :1]), ((3, 1), lambda x: x + 1),
        ((3, 2), lambda x: 99), ((3, 5), lambda x: 2**40), ((0, 2), lambda x: x[0]), ((2, 0), lambda x: x.astype(mx.float32)),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(qwen, place, change):
    cache = make_prompt_cache(qwen, kv(3, 4, sink=3))
    mx.eval(qwen(tokens(length=150), cache=cache))
    state = [list(part) for part in cache[0].state]
    PackedKVCache.from_state(state)
    state[place[0]][place[1]] = change(state[place[0]][place[1]])
    with pytest.raises(ValueError, match="save the cache again"):
        PackedKVCache.from_state(state)


# -- the hook, choices, bad input


def test_the_hook_goes_with_its_last_holder_and_leaves_others_alone(qwen):
    gc.collect()
    assert base.quantized_scaled_dot_product_attention is ORIGINAL
    ids = tokens()
    before = read(qwen, ids, own(qwen, 4))
    handle = tqai.apply(qwen, kv(4))
    cache = handle.cache()
    assert base.quantized_scaled_dot_product_attention is not ORIGINAL
    assert (read(qwen, ids, own(qwen, 4)) == before).all()
    handle.remove()
    read(qwen, ids, cache)  # still good
    del cache, handle
    gc.collect()
    assert base.quantized_scaled_dot_product_attention is ORIGINAL


def test_a_deep_copy_counts_for_itself_and_goes_on_alike(qwen):
    cache = make_prompt_cache(qwen, kv(4))
    mx.eval(qwen(tokens(), cache=cache))
    other = copy.deepcopy(cache)
    more = tokens(length=20, seed=3)
    out = qwen(more, cache=other)
    assert (cache.report().evaluations, other.report().evaluations) == (1, 2)
    assert cache[0].offset == 200
    assert (out == qwen(more, cache=cache)).all()


def test_layers_that_stay_exact_are_exact(qwen):
    ids = tokens()
    exact = read(qwen, ids, caches.make_prompt_cache(qwen))
    for config in (kv(2, skip_layers=(0, -1)), tqai.Config(level="kv", codec="exact")):
        cache = make_prompt_cache(qwen, config)
        assert (read(qwen, ids, cache) == exact).all()
        assert len(cache.report().fallbacks) == 2
    deep = make_prompt_cache(tiny(layers=8), kv(4, protect=2))
    assert [c.plan.bits_k for c in deep] == [8, 4, 4, 4, 4, 4, 4, 8]


def test_layers_of_other_kinds_keep_their_own_caches(qwen, monkeypatch):
    monkeypatch.setattr(type(qwen), "make_cache", lambda self: [caches.RotatingKVCache(64), caches.KVCache()], raising=False)
    cache = make_prompt_cache(qwen, kv(4))
    assert [type(c) for c in cache] == [caches.RotatingKVCache, PackedKVCache]
    assert cache.report().fallbacks == [{"where": "attn.0", "why": "RotatingKVCache keeps its own form"}]


def test_nan_is_reported_and_stays_nan(qwen):
    cache = make_prompt_cache(qwen, kv(4))
    mx.eval(qwen(tokens(length=100), cache=cache))
    assert not cache.report().warnings
    layer = cache[1]
    k = mx.ones((1, 2, 40, 32))
    k[:, :, 5] = math.nan
    layer.update_and_fetch(k, mx.ones((1, 2, 40, 32)))
    layer.settle()
    assert any("attn.1: keys or values hold NaN" in text for text in cache.report().warnings)
    assert mx.isnan(layer.attend(mx.ones((1, 4, 1, 32)), 1.0, None)).any()


def test_bad_input_has_a_cure(qwen, monkeypatch):
    with pytest.raises(ValueError, match="level='kv'"):
        make_prompt_cache(qwen, tqai.Config())
    with pytest.raises(ValueError, match="level='kv'"):
        tqai.apply(qwen, tqai.Config())
    with pytest.raises(ValueError, match="scorer and monitor asked"):
        make_prompt_cache(qwen, tqai.Config(level="kv", scorer="palm", monitor="stability"))
    with pytest.raises(ValueError, match=r"mlx_lm\.load"):
        make_prompt_cache(object())
    with pytest.raises(ValueError, match="has 2 layers: use 0 to 1"):
        make_prompt_cache(qwen, kv(4, skip_layers=(2,)))
    small = tiny(d=16)
    with pytest.raises(ValueError, match="multiple of 32"):
        small(tokens(), cache=make_prompt_cache(small))
    cache = make_prompt_cache(qwen)
    qwen(tokens(), cache=cache)
    with pytest.raises(ValueError, match="another model or batch"):
        qwen(tokens(batch=2), cache=cache)
    monkeypatch.setattr(qwen2, "scaled_dot_product_attention", mx.fast.scaled_dot_product_attention)
    with pytest.raises(ValueError, match="does not attend through"):
        make_prompt_cache(qwen)


# -- the trained mini

WINDOWS, LENGTH, PREFILL, CHUNK = 2, 768, 320, 32


def perplexity(model, x, cache):
    mx.eval(model(x[:, :PREFILL], cache=cache))
    nats = []
    for at in range(PREFILL, LENGTH, CHUNK):
        out = model(x[:, at : at + CHUNK], cache=cache)
        out = out - mx.logsumexp(out, -1, keepdims=True)
        nats.append(-mx.take_along_axis(out, x[:, at + 1 : at + CHUNK + 1, None], -1).mean().item())
    return math.exp(sum(nats) / len(nats))


@pytest.fixture(scope="module")
def windows():
    text = minis.lm_text()
    starts = np.linspace(0, len(text) - LENGTH - 1, WINDOWS + 2).astype(int)[1:-1]
    return mx.array(np.stack([text[i : i + LENGTH + 1].numpy() for i in starts]))


@pytest.fixture(scope="module")
def most(windows):
    """A fifth of what mlx-lm's own 4 bits cost the plain mini."""
    model = mini()
    return (perplexity(model, windows, own(model, 4, 64)) / perplexity(model, windows, caches.make_prompt_cache(model)) - 1) / 5


@pytest.mark.parametrize("variant", minis.LM_VARIANTS)
def test_perplexity_of_the_mini(variant, windows, most):
    model = mini(variant)
    exact = perplexity(model, windows, caches.make_prompt_cache(model))
    for bits in (4, 2):  # all variants compute one function: one bound
        cache = make_prompt_cache(model, kv(bits, sink=4, recent=32, calibrate=256))
        assert abs(perplexity(model, windows, cache) / exact - 1) < most, (variant, bits)
    if variant == "outlier":
        assert perplexity(model, windows, own(model, 4, 64)) > 2 * exact


def test_the_mini_is_the_mini():
    import torch

    ids = minis.lm_text()[None, :100]
    with torch.no_grad():
        wanted = minis.lm()(ids).logits
    got = mini()(mx.array(ids.numpy()))
    np.testing.assert_allclose(np.array(got), wanted.numpy(), atol=2e-3)
