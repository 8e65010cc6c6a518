"""Caches that use a calibration file: bits by layer for keys and values, shaped errors; and the defaults of caches."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch

import tqai_core as tqai
from tqai_core import minis
from tqai_core.calibrate import run
from tqai_core.calibrate.cache_tables import DAMAGE, METRIC, SHAPES
from tqai_core.calibrate.caches import EVEN, LAST, coded, measured
from tqai_core.codecs.rows import BITS, rows
from tqai_core.codecs.shaped import STEP, Shaped, feedback, shapes
from tqai_core.files import read_tensors, write_tensors
from tqai_core.hosts.calibration_targets import Language, Windows
from tqai_core.kv.calibrated import load, share_out


def held_out(count: int = 512) -> torch.Tensor:
    return minis.lm_text()[-count - 1 :][None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The mini and its file; two windows and two probes are little, and enough here."""
    lm = minis.lm()
    path = tmp_path_factory.mktemp("calibration") / "lm.safetensors"
    found = run.calibrate(Language(lm, Windows(minis.lm_text()[: 2**16], 2)), path, seeds=(100, 101), probes=1)
    return lm, path, found


def read(lm, config, x):
    """Log probabilities of the last 192 tokens, read 32 at a time, and the cache."""
    with tqai.apply(lm, config) as handle:
        cache = handle.cache()
        return through(lm, cache, x), cache


@torch.no_grad()
def through(lm, cache, x):
    lm(x[:, :320], past_key_values=cache)
    return torch.cat([lm(x[:, at : at + 32], past_key_values=cache).logits for at in range(320, 512, 32)], 1).log_softmax(-1)


def kl(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def reading_ids(seed, length):
    return Windows(minis.lm_text()[: 2**16], 2)(seed, length)[:1]


# -- shaped rows


def moments(count=2000, d=32, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    fall = torch.linspace(0, -3, d).exp()
    mix = torch.linalg.qr(torch.randn(2, heads, d, d, generator=g))[0]
    x, q = (torch.randn(1, heads, count, d, generator=g) * fall @ m for m in mix)
    return x, q


def test_shaped_rows_lose_less_of_the_scores_at_the_same_bytes():
    x, q = moments()
    half = len(x[0, 0]) // 2
    plain = rows(32, 4, 0, torch.device("cpu"))
    found = shapes(*(y[0, :, :half].mT @ y[0, :, :half] for y in (x, q)))
    errors = []
    for coder in (plain, Shaped(plain, found[0]), Shaped(plain, *found)):
        codes, gain = coder.encode(x)
        assert codes.shape[-1] == plain.row_bytes
        errors.append(((coder.decode(codes, gain) - x)[:, :, half:] @ q[:, :, half:].mT).square().mean())
        met = coder.query(q) @ (coder.lookup(codes) * gain.float()[..., None]).mT
        assert torch.allclose(met, q @ coder.decode(codes, gain).mT, atol=1e-4)
        total = coder.unrotate(coder.rotate(x[:, :, :3]))
        assert torch.allclose(total, x[:, :, :3], atol=1e-4)
    assert errors[1] < 0.6 * errors[0], "of an older file"
    assert errors[2] < 0.5 * errors[1], "with feedback"


def test_shapes_heed_no_outlier_channels():
    """Channels 100 times as large, met by queries as much smaller, are coded as if nothing had been done to them."""
    x, q = moments()
    factor = torch.ones(32)
    factor[[3, 17]] = 100.0
    found = []
    for k, asked in ((x, q), (x * factor, q / factor)):
        coder = Shaped(rows(32, 4, 0, torch.device("cpu")), *shapes(*(y[0].mT @ y[0] for y in (k, asked))))
        found.append(((coder.decode(*coder.encode(k)) - k) @ asked.mT).square().mean())
    assert float(found[1] / found[0]) == pytest.approx(1, rel=0.02)


def test_feedback_is_the_block_cholesky_factor_of_the_metric():
    """Errors of white noise before the feedback cost the blocks' own parts of the metric, each after those behind it."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(2, 32, 64, generator=g)
    metric = root @ root.mT
    own = feedback(metric)
    inside = torch.eye(32) + own.mT  # what a block adds to its own error
    left = torch.linalg.solve(inside.mT, torch.linalg.solve(inside.mT, metric).mT).mT
    blocks = torch.block_diag(*[torch.ones(STEP, STEP)] * (32 // STEP)).bool()
    assert (left.masked_fill(blocks, 0).abs().amax() / metric.abs().amax()) < 1e-4


def test_a_layer_coded_alone_tells_its_damage(made):
    """The table is what it costs to code one layer at 4 bits; sums of layers are about what they cost together."""
    lm, _, _ = made
    reading = Language(lm, Windows(minis.lm_text()[: 2**16], 2)).reading((7, 8), 600, LAST, 0.5)
    assert float(reading.where[1, 0]) > 0
    with torch.no_grad():  # without a cache, without layers left out
        out = lm(torch.cat([reading_ids(seed, 600) for seed in (7, 8)]), position_ids=reading.where).logits[:, -LAST:].log_softmax(-1)
    assert (out - reading.exact).abs().max() < 1e-3
    count = len(lm.model.layers)
    table = measured(reading, None)
    four = table[..., BITS.index(4)]
    four = four - four.mean(0) * EVEN / (1 + EVEN)
    assert float(four[1, 0]) == pytest.approx(reading.loss(coded({1: (4, 0)}, None)), rel=1e-3)
    whole = reading.loss(coded(dict.fromkeys(range(count), (4, 4)), None))
    assert float(four.sum()) == pytest.approx(whole, rel=0.35)
    assert bool((table.diff(dim=-1) <= 0).all()), "more bits never cost more"


# -- bits


def test_bits_go_where_they_help_and_keep_the_budget():
    curve = torch.tensor([4.0 ** (2 - b) for b in BITS])
    damage = curve.repeat(3, 2, 1) * torch.tensor([[1.0, 0.01], [100.0, 1.0], [1.0, 1.0]])[..., None]
    for average in (2.0, 3.0, 3.5, 3.9, 4.0, 6.0, 8.0):
        found = share_out(damage, average)
        total = sum(map(sum, found)) / 6
        assert average - 2 / 6 <= total <= average + 1e-9, average
        if 2 < average < 8:
            assert found[1][0] == max(max(pair) for pair in found)
            assert found[0][1] == min(min(pair) for pair in found)
    flat = damage.clone()
    flat[0, 0, 1:] = flat[0, 0, :1]  # nothing to gain there
    assert share_out(flat, 4.0)[0][0] == 2
    with pytest.raises(tqai.TqaiError, match=r"1\.5 bits"):
        share_out(damage, 1.5)


def test_a_file_gives_less_error_at_equal_bytes(made):
    lm, path, found = made
    verdict = found.header["verdicts"]["cache"]
    assert verdict["kept"] == ["k"] * (SHAPES[0] in found.tensors)
    x = held_out()[:, :512]
    options = dict(level="kv", recent=0, sink=4)
    with torch.no_grad():
        exact = lm(x).logits[:, 320:].log_softmax(-1)
    plain, cache = read(lm, tqai.Config(codec="turbo:bits=4", **options), x)
    config = tqai.Config(codec={"name": "turbo", "bits": 4, "file": str(path)}, **options)
    own, other = read(lm, config, x)
    assert other.materialised == 0
    assert kl(exact, own) < kl(exact, plain)
    assert other.nbytes <= cache.nbytes
    mean = sum(layer.kv.plan.bits_k + layer.kv.plan.bits_v for layer in other.packed_layers) / (2 * len(other.packed_layers))
    assert mean <= 4
    thin = tqai.Config(codec={"name": "turbo", "average": 3.25, "file": str(path)}, **options)
    assert tqai.Config.from_json(thin.to_json()) == thin
    assert sum(l.kv.plan.bits_k + l.kv.plan.bits_v for l in tqai.KVCache(lm.config, thin).packed_layers) <= 3.25 * 8  # noqa: E741


def test_in_place_and_dense_read_the_same(made, monkeypatch):
    lm, path, _ = made
    x = held_out()[:, :512]
    found = []
    for strategy in (None, "delta2"):
        config = tqai.Config(level="kv", codec={"name": "turbo", "bits": 4, "file": str(path)}, strategy=strategy, recent=8)
        for native in ("", "0"):
            monkeypatch.setenv("TQAI_NATIVE", native)
            found.append(read(lm, config, x)[0])
        cache = tqai.KVCache(lm.config, config)
        with pytest.warns(UserWarning, match="dense"):
            found.append(through(lm, cache, x))
        native, torchs, dense = found[-3:]
        assert (native - torchs).abs().max() < 2e-3
        assert (dense - torchs).abs().max() < 2e-3  # keys are centred alone: the queries that sdpa hides are not asked for


def test_a_cache_comes_back_from_a_file_and_with_its_calibration_alone(made, tmp_path):
    lm, path, _ = made
    x = held_out()[:, :400]
    config = tqai.Config(level="kv", codec={"name": "turbo", "bits": 3, "file": str(path)}, recent=8)
    with tqai.apply(lm, config) as handle, torch.no_grad():
        cache = handle.cache()
        lm(x[:, :384], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        again, copied = handle.load(tmp_path / "cache.safetensors"), copy.deepcopy(cache)
        one, two, three = (lm(x[:, 384:], past_key_values=c).logits for c in (cache, again, copied))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    metadata, tensors = read_tensors(path, what="calibration", again="")
    assert SHAPES[0] in tensors
    tensors[METRIC] = (tensors[METRIC].float() * 1.5).half()
    write_tensors(path.with_name("other.safetensors"), tensors, metadata)
    before = path.read_bytes()
    try:
        path.write_bytes(path.with_name("other.safetensors").read_bytes())
        with pytest.raises(tqai.TqaiError, match="another calibration file"):
            tqai.KVCache.load(tmp_path / "cache.safetensors", lm.config)
    finally:
        path.write_bytes(before)


def test_bad_files_are_refused(made, tmp_path):
    lm, path, found = made
    metadata, tensors = read_tensors(path, what="calibration", again="")
    header = json.loads(metadata["tqai-calibration"])

    def written(change, edit=lambda header: header):
        out = tmp_path / "changed.safetensors"
        write_tensors(out, change(dict(tensors)), {**metadata, "tqai-calibration": json.dumps(edit(copy.deepcopy(header)))})
        return str(out)

    cut = lambda name, to: lambda t: {**t, name: to(t[name])}
    singular = lambda x: torch.zeros_like(x)
    cases = [
        (cut(DAMAGE, lambda x: x[:, :, :5].contiguous()), DAMAGE), (cut(DAMAGE, lambda x: -x - 1), "range"),
        (lambda t: {k: v for k, v in t.items() if k != DAMAGE}, "nothing for caches"),
    ]  # fmt: skip
    assert {SHAPES[0], METRIC} <= found.tensors.keys()
    cases += [(cut(SHAPES[0], singular), "inverse"), (cut(METRIC, singular), METRIC), (cut(METRIC, lambda x: -x), METRIC)]
    cases += [(lambda t: {k: v for k, v in t.items() if k != SHAPES[0]}, METRIC)]
    for change, why in cases:
        name = written(change)
        with pytest.raises(tqai.TqaiError, match=why):
            tqai.KVCache(lm.config, tqai.Config(level="kv", codec={"name": "turbo", "file": name}))
    shape, own = (load(name).shapes[0][0] for name in (written(lambda t: {k: v for k, v in t.items() if k != METRIC}), str(path)))
    assert shape.metric is None, "a file of before noise feedback is read as before"
    assert torch.equal(shape.matrices, own.matrices)
    assert shape.name != own.name
    older = written(lambda t: {k: v for k, v in t.items() if k not in (DAMAGE, METRIC, *SHAPES)}, lambda h: {**h, "verdicts": {
        key: value for key, value in h["verdicts"].items() if key != "cache"}})  # fmt: skip
    with pytest.raises(tqai.TqaiError, match="calibrate this language model again"):
        load(older)
    assert tqai.Config(level="attention", scorer=f"fisher:file={older}", strategy="delta").scorer  # the rest of it is read as before
    torch.manual_seed(0)
    with pytest.raises(tqai.TqaiError, match="belongs to model"):
        tqai.apply(type(lm)(lm.config).eval(), tqai.Config(level="kv", codec={"name": "turbo", "file": str(path)}))
    for codec, why in (
        ({"name": "turbo", "file": str(path), "bits_k": 4}, "bits_k"), ({"name": "turbo", "average": 3.5}, "file="),
    ):  # fmt: skip
        with pytest.raises(tqai.TqaiError, match=why):
            tqai.Config(level="kv", codec=codec)
    with pytest.raises(tqai.TqaiError, match="caches of language models"):
        tqai.Config(level="attention", codec={"name": "turbo", "file": str(path)})


def test_a_trial_codes_what_a_cache_would():
    """Sinks and the last tokens stay exact; more bits lose less."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 4, 300, 64, generator=g), *(torch.randn(1, 2, 300, 64, generator=g) for _ in range(2))
    gaps = []
    for bits in (3, 4, 5):
        keys, values = coded({0: (bits, bits)}, None)(0, q, k, v)
        for x, own in ((k, keys), (v, values)):
            assert torch.equal(own[:, :, :4], x[:, :, :4])
            assert torch.equal(own[:, :, -LAST:], x[:, :, -LAST:])
        gaps.append([(x - y).square().mean() / y.square().mean() for x, y in ((keys, k), (values, v))])
    for x, y in pairwise(gaps):
        assert y[0] < x[0] / 3
        assert y[1] < x[1] / 3


# -- defaults


def test_the_default_is_k5v4_and_old_configs_are_read():
    lm = minis.lm()
    plan = tqai.KVCache(lm.config).layers[0].kv.plan
    assert (plan.bits_k, plan.bits_v, plan.sink, plan.recent) == (5, 4, 4, 28)
    assert tqai.Config(level="kv") == tqai.preset("k5v4")
    old = {"level": "kv", "codec": "turbo", "sink": 4, "recent": 64, "protect": 2, "calibrate": 256, "version": 1}
    found = tqai.Config.from_dict(old)
    assert (found.codec, found.recent, found.protect) == ("turbo", 64, 2)
    step = {"level": "model", "strategy": "delta2", "sink": 4, "recent": 64, "protect": 2, "calibrate": 256, "version": 1}
    assert tqai.Config.from_dict(step) == tqai.Config(strategy="delta2")
