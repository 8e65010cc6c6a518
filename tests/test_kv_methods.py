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
from tqai_core.attention.backends import native
from tqai_core.attention.packed import attend
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.policy import policy
from tqai_core.kv.segments import Plan
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
    k = (
        torch.randn(batch, h, n, d, generator=g) * 0.5
        + torch.randn(batch, h, n // 16 + 1, d, generator=g).repeat_interleave(16, 2)[:, :, :n]
    )
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
        assert cache.nbytes == nbytes([[vars(s) for s in (*x.kv.segments, *x.kv.fine)] + [vars(x.kv.policy), vars(x.kv.statistics),
            x.kv.keys, x.kv.values] for x in cache.layers])  # fmt: skip
        json.loads(report.to_json())
        assert report.to_markdown()
        ran += 1
    kinds = {role: [m for m in methods(role, kv_fisher) if works(role, m)] for role in ("scorer", "strategy", "monitor")}
    assert ran == math.prod(map(len, kinds.values()))
    assert ran >= 5 * 5 * 3


# -- the same whoever reads, whatever happened


SOME = "stability:flush_tau=0.015"  # raises some flushes, not the first
STRATEGIES = [None, "tiered:share=0.3,high=8", "delta:block=16", "delta2:block=16", "window:density=1"]


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(1, 90), st.integers(-80, -1)), min_size=1, max_size=7),
    scorer=st.sampled_from([None, "palm", "sheaf", "bsa"]),
    strategy=st.sampled_from(STRATEGIES),
    monitor=st.sampled_from([None, "lyapunov:tau=0.05,warmup=1", "stability:flush_tau=0.02"]),
    batch=st.integers(1, 2),
    bits=st.sampled_from(["turbo:bits=2", "turbo:bits_k=4,bits_v=3", "turbo:bits=8"]),
    seed=st.integers(0, 99),
)
def test_any_history_reads_the_same_in_place_and_dense(steps, scorer, strategy, monitor, batch, bits, seed):
    """Appends and crops in any order, also into packed blocks and tiers."""
    config = tqai.Config(level="kv", codec=bits, scorer=scorer, strategy=strategy, monitor=monitor)
    turbo = build("codec", config.codec)
    methods, plan = policy(config, Plan(turbo.bits_k or turbo.bits, turbo.bits_v or turbo.bits, sink=3, recent=20, calibrate=20), 0, 1)
    kv, k_all = PackedKV(plan, methods), torch.zeros(batch, 2, 0, 32)
    for i, n in enumerate(steps):
        if n < 0:
            n = min(-n, kv.length)
            kv.crop(n)
            k_all = k_all[:, :, : k_all.shape[2] - n]
            continue
        k, v, q = spoken(batch, n, seed=100 * seed + i)
        kv.append(k, v)
        k_all = torch.cat([k_all, k], 2)
        kv.observe(q)
        same(q, kv)
        mask = torch.rand(batch, 1, n, kv.length, generator=torch.Generator().manual_seed(i)) > 0.3
        mask[..., 0] = True
        same(q, kv, mask)
        kv.settle()
    assert kv.length == k_all.shape[2]
    if kv.length:
        dense = kv.dense("k")
        assert dense.shape == k_all.shape
        assert torch.equal(dense[:, :, : min(3, kv.length)], k_all[:, :, :3])
        assert float((dense - k_all).square().mean() / k_all.square().mean()) < 0.3


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_softcap_and_the_weight_without_value(strategy):
    kv, _, _, _ = filled(strategy=strategy, scorer="palm")
    assert kv.packed
    q = torch.randn(2, 4, 3, 32)
    k, v = (kv.dense(x).repeat_interleave(2, 1) for x in "kv")
    scores = (5 * (q @ k.mT * 0.2 / 5).tanh()).masked_fill(torch.arange(400)[None] > torch.arange(397, 400)[:, None], float("-inf"))
    aux = torch.tensor([0.5, 4.0, -2.0, 9.0])
    for native_too in (True, False):
        got = attend(q, kv, scaling=0.2, softcap=5.0, native=native_too)
        assert torch.allclose(got, scores.softmax(-1) @ v, atol=3e-4)
        got = attend(q, kv, scaling=0.2, softcap=5.0, aux=aux, native=native_too)
        with_aux = torch.cat([scores, aux.view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
        assert torch.allclose(got, with_aux @ v, atol=3e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scorer", [None, "palm"])
def test_batch_changes_are_exact(strategy, scorer):
    kv, _, _, _ = filled(batch=3, strategy=strategy, scorer=scorer, monitor=SOME, piece=100)
    dense, q = kv.dense("k"), torch.randn(3, 4, 1, 32)
    out = attend(q, kv, scaling=0.2)
    kv.map_batch(lambda x: x.index_select(0, torch.tensor([2, 0, 0])))
    assert torch.equal(kv.dense("k"), dense[[2, 0, 0]])
    assert torch.allclose(attend(q[[2, 0, 0]], kv, scaling=0.2), out[[2, 0, 0]], atol=1e-5)
    kv.map_batch(lambda x: x[torch.tensor([1])])
    assert torch.equal(kv.dense("k"), dense[[0]])


@pytest.mark.parametrize("scorer", ["palm", "sheaf", "bsa"])
def test_a_sequence_does_not_depend_on_its_batch(scorer):
    data = spoken(3, 400)
    together = filled(data=data, scorer=scorer, strategy="tiered", batch=3)[0]
    alone = filled(data=tuple(x[1:2] for x in data), scorer=scorer, strategy="tiered", batch=1)[0]
    assert torch.equal(together.policy.tensors["tier"][1:2], alone.policy.tensors["tier"])
    assert torch.allclose(together.dense("k")[1:2], alone.dense("k"), atol=1e-5)


def test_without_methods_nothing_is_sorted_or_kept():
    plain, _, _, _ = filled()
    assert plain.policy.plain
    assert not plain.policy.tensors
    with_all = filled(scorer="bsa", strategy="tiered", monitor="stability")[0]
    assert with_all.nbytes > plain.nbytes
    assert set(with_all.policy.tensors) == {"queries", "tier"}
    with_all.crop(400)
    assert with_all.policy.tensors.keys() <= {"queries"}
    with_all.clear()
    assert with_all.nbytes == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers_stay_exact(bad):
    kv, k, v, q = filled(scorer="palm", strategy="delta", monitor="lyapunov")
    packed = kv.packed
    k, v, q = spoken(2, 300, seed=4)
    k[0, 0, 220, 5] = bad
    kv.append(k, v)
    kv.observe(q)
    kv.settle()
    assert "NaN or inf" in kv.exact_why
    assert packed <= kv.packed < kv.length - 50
    assert kv.dense("k")[:, :, -50:].nan_to_num(7, 7, 7).equal(k[:, :, -50:].nan_to_num(7, 7, 7))


# -- scorers


def tiers_of(kv):
    """Positions of the fine tokens of the first sequence."""
    return (kv.policy.tensors["tier"][0].nonzero().view(-1) + kv.plan.sink).tolist()


def test_palm_gives_novel_tokens_more_bits():
    k, v, q = spoken(1, 400, seed=1)
    k[:, :, 100], k[:, :, 207] = 12 * torch.randn(1, 2, 32), -12 * torch.randn(1, 2, 32)
    kv, *_ = filled(data=(k, v, q), scorer="palm", piece=40)
    fine = tiers_of(kv)
    assert {100, 207} <= set(fine)
    assert len(fine) == pytest.approx(kv.packed / 8, rel=0.1)
    error = (kv.dense("k") - k).norm(dim=-1)[0, 0] / k.norm(dim=-1)[0, 0]
    others = [i for i in range(4, kv.packed) if i not in fine]
    assert float(error[fine].mean()) < 0.6 * float(error[others].mean())


def test_palm_forgets_as_alpha_says():
    """What was new becomes usual after a while, the sooner the larger alpha."""
    k, _, _ = spoken(1, 600, seed=1)
    k[:, :, 300:] += 5 * torch.randn(1, 2, 1, 32)
    ranks = {}
    for alpha in (0.01, 0.9):
        scorer, state = build("scorer", {"name": "palm", "alpha": alpha}), {}
        flush = lambda a, b: type("F", (), {"k": k[:, :, a:b], "state": state})()  # noqa: B023
        out = torch.cat([scorer.weigh(flush(a, a + 100)) for a in range(0, 600, 100)], 1)
        assert bool((out >= 0).all() and (out <= 1).all())
        ranks[alpha] = float(out[0, 400:].mean() - out[0, 100:290].mean())
    assert ranks[0.01] > ranks[0.9] + 0.05


def test_sheaf_gives_bits_where_neighbours_disagree():
    k, v, q = spoken(1, 400, seed=1)
    k = 0.05 * torch.randn(1, 2, 400, 32) + torch.randn(1, 2, 1, 32)
    k[:, :, 120:136] *= (1 - 2 * (torch.arange(16) % 2).float())[:, None]
    fine = set(tiers_of(filled(data=(k, v, q), scorer="sheaf", piece=400)[0]))
    assert len(fine & set(range(119, 137))) >= 15


def test_bsa_gives_bits_to_the_block_that_queries_want():
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, h, 400, 32, generator=g) for h in (2, 2, 4))
    want = F.normalize(torch.randn(32, generator=g), dim=0)
    q[:, :, -4:] += 8 * want
    k[:, :, 164:180] += 4 * want
    kv, *_ = filled(data=(k, v, q), scorer="bsa:block=16")
    assert len(set(tiers_of(kv)) & set(range(160, 184))) >= 12
    hidden = filled(data=(k, v, torch.zeros(1, 4, 400, 5)), scorer="bsa")[0]
    assert not hidden.fine, "an attention that hides its queries gives it nothing to judge by"


def test_fisher_raises_the_keys_or_values_of_a_layer(qwen, kv_fisher):
    cache = tqai.KVCache(qwen.config, tqai.Config(**BASE, scorer=f"fisher:file={kv_fisher}", strategy="tiered:share=0.25"))
    plans = [layer.kv.plan for layer in cache.layers]
    assert [(p.bits_k, p.bits_v) for p in plans] == [(2, 2), (2, 8)]
    with pytest.raises(ValueError, match="tqai calibrate"):
        tqai.Config(**BASE, scorer="fisher")
    deeper = Qwen2Config(**{**SMALL, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="2 layers, this model 3"):
        tqai.KVCache(deeper, tqai.Config(**BASE, scorer=f"fisher:file={kv_fisher}"))


def test_fisher_prefers_the_damage_that_a_table_tells(tmp_path):
    from safetensors.torch import save_file

    damage = torch.zeros(2, 2, 2, 1, 8)
    damage[0, :, 0, :, 3] = 1.0
    path = str(tmp_path / "t.safetensors")
    save_file({"fisher": torch.ones(2, 2, 2, 1), "sigmas": torch.tensor([0.5]), "damage": damage}, path)
    scorer = build("scorer", f"fisher:file={path}")
    assert [scorer.finer(i, 2, 0.25) for i in range(2)] == [(True, False), (False, False)]


# -- strategies


@given(share=st.floats(0.05, 1), n=st.integers(200, 600), codec=st.sampled_from(["turbo:bits=2", "turbo:bits_k=4,bits_v=2"]))
@settings(max_examples=10, deadline=None)
def test_tiered_bits_are_told_exactly(share, n, codec):
    kv, *_ = filled(n=n, codec=codec, strategy={"name": "tiered", "share": share, "high": 8})
    told = kv.policy.report(kv.tiers())
    codes = lambda which: sum(getattr(s, f"codes_{which}").nbytes for s in (*kv.segments, *kv.fine))
    for which in "kv":
        assert told[f"bits_{which}"] == pytest.approx(8 * codes(which) / (2 * 2 * kv.packed * 32), abs=1e-3)
    assert told["share_fine"] == pytest.approx(share, abs=0.03)
    sums = kv.policy.tensors["tier"].sum(1)
    assert bool((sums == sum(map(len, kv.fine))).all())


def test_tiered_without_a_scorer_takes_the_largest_errors():
    kv, k, _, _ = filled(strategy="tiered")
    size = kv.statistics.stored(k).square().sum((1, 3))[0, 4 : 4 + kv.packed]
    fine = torch.tensor(tiers_of(kv)) - 4
    mask = torch.zeros(kv.packed, dtype=torch.bool)
    mask[fine] = True
    assert size[mask].mean() > 1.2 * size[~mask].mean()
    plain = filled()[0]
    error = [float((x.dense("k") - k).square().sum()) for x in (kv, plain)]
    assert error[0] < 0.8 * error[1]


def line(n=400, d=32, seed=0):
    """Keys on a zigzag of straight lines, 32 tokens each."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.randn(1, 2, n // 32 + 2, d, generator=g) * 2
    at = torch.arange(n) / 32
    low, part = at.long(), (at % 1)[:, None]
    k = ends[:, :, low] * (1 - part) + ends[:, :, low + 1] * part
    return k + 0.2 * torch.randn(1, 2, n, d, generator=g), torch.randn(1, 2, n, d, generator=g), torch.randn(1, 4, n, d, generator=g)


def test_delta_codes_what_a_block_does_not_share_and_only_where_that_pays():
    k, v, q = spoken(2, 420)
    error = {s: float((filled(n=420, data=(k, v, q), strategy=s)[0].dense("k") - k).square().sum()) for s in (None, "delta:block=16")}
    assert error["delta:block=16"] < 0.6 * error[None]
    on = filled(n=420, data=(k, v, q), strategy="delta:block=16")[0]
    plain = filled(n=420, data=(k, v, q))[0]
    assert on.policy.predicts
    assert on.nbytes > plain.nbytes, "the anchors are counted"
    assert on.policy.report(on.tiers())["residual_energy"] < 0.7
    g = torch.Generator().manual_seed(1)
    noise = tuple(torch.randn(1, h, 400, 32, generator=g) for h in (2, 2, 4))
    off, plain = filled(data=noise, strategy="delta")[0], filled(data=noise)[0]
    assert off.policy.predicts is False
    assert "cost more" in off.policy.fallbacks()[0]
    same_rows = min(off.packed, plain.packed)
    assert torch.equal(off.dense("k")[:, :, : 4 + same_rows], plain.dense("k")[:, :, : 4 + same_rows]), "off is the plain cache"


def test_delta2_follows_a_line():
    data = line()
    error = {}
    for strategy in (None, "delta", "delta2"):
        kv = filled(data=data, strategy=strategy and f"{strategy}:block=32")[0]
        error[strategy] = float((kv.dense("k") - data[0])[:, :, 4 : 4 + kv.packed].square().mean())
    assert error["delta2"] < 0.8 * error["delta"] < 0.8 * error[None]


@pytest.mark.parametrize("monitor", [None, SOME])
@pytest.mark.parametrize("scorer", [None, "bsa", "palm"])
def test_window_reads_its_blocks_and_no_others(scorer, monitor):
    """What is not read is poisoned; the result is that of a mask over the blocks that are."""
    kv, *_ = filled(n=700, scorer=scorer, strategy="window:density=0.25,block=16", monitor=monitor, piece=70)
    assert kv.packed % 16 == 0
    assert bool(kv.fine) == bool(monitor)
    query = torch.randn(2, 4, 1, 32)
    read = torch.zeros(2, 2, kv.packed // 16, dtype=torch.bool)
    for tier, change in zip(kv.tiers(), kv.policy.adjust((query * 0.2).reshape(2, 2, 2, 32), kv.tiers(), 1), strict=True):
        assert change.block == 16
        own = change.read
        blocks = torch.arange(own.shape[2]).expand(2, -1) if tier.order is None else tier.order[:, ::16] // 16
        read.scatter_(2, blocks[:, None].expand(-1, 2, -1), own)
        for s, piece in zip(tier.segments, own.split([len(s) // 16 for s in tier.segments], 2), strict=True):
            for gain in (s.gain_k, s.gain_v):
                gain[~piece.repeat_interleave(16, 2)] = float("nan")
    assert 0.2 < float(read.float().mean()) < 0.32
    ends = torch.ones(2, 2, kv.length, dtype=torch.bool)
    ends[:, :, 4 : 4 + kv.packed] = read.repeat_interleave(16, 2)
    want = reference(query, kv.dense("k").nan_to_num(), kv.dense("v").nan_to_num(), ends.repeat_interleave(2, 1)[:, :, None])
    for way in (True, False):
        assert torch.allclose(attend(query, kv, scaling=0.2, native=way), want, atol=3e-4)
    share = kv.policy.report(kv.tiers())["share_read"]
    assert share == pytest.approx(float(read.float().mean()), abs=0.02)


def test_window_finds_what_the_query_wants():
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, h, 1000, 32, generator=g) for h in (2, 2, 4))
    want = F.normalize(torch.randn(32, generator=g), dim=0)
    k[:, :, 180:196] += 6 * want
    query = 4 * want.expand(1, 4, 1, 32)
    errors = {}
    for scorer in (None, "bsa"):
        kv = filled(data=(k, v, q), n=1000, scorer=scorer, strategy="window:density=0.1,block=16", codec="turbo:bits=8")[0]
        exact = reference(query, k, v, scaling=1.0)
        errors[scorer] = float((attend(query, kv, scaling=1.0) - exact).norm() / exact.norm())
    assert errors["bsa"] < 0.1 < errors[None]


# -- monitors


def raised(kv):
    return [d["action"] == "raise" for d in kv.policy.decisions]


def test_lyapunov_measures_the_error_of_a_flush_and_keeps_it_below_tau():
    strict, loose = (filled(n=500, monitor=f"lyapunov:tau={tau}", piece=40)[0] for tau in (0.0, 10.0))
    assert all(raised(strict))
    assert not any(raised(loose))
    assert not strict.segments
    assert not loose.fine
    errors = [d["error"] for d in loose.policy.decisions]
    assert all(e is not None and e > 0 for e in errors[:3])
    assert any(e is None for e in errors[3:]), "not every flush is measured"
    tau = (min(errors[:3]) + max(errors[:3])) / 2
    between = filled(n=500, monitor={"name": "lyapunov", "tau": tau}, piece=40)[0]
    assert 0 < sum(raised(between)) < len(raised(between))
    assert strict.nbytes > between.nbytes > loose.nbytes
    for kv in (strict, between, loose):
        assert kv.policy.report(kv.tiers())["flushes_raised"] == sum(raised(kv))
    for d in between.policy.decisions:
        assert d["error"] is None or (d["error"] > tau) == (d["action"] == "raise")


def test_lyapunov_error_is_the_true_one():
    k, v, q = spoken(1, 140)
    kv, *_ = filled(n=140, data=(k, v, q), monitor="lyapunov:tau=10")
    (told,) = [d["error"] for d in kv.policy.decisions]
    exact, changed = (
        reference(q[:, :, -4:], *kv_pair, torch.ones(4, 140, dtype=torch.bool), 32**-0.5)
        for kv_pair in ((k, v), (kv.dense("k"), kv.dense("v")))
    )
    assert told == pytest.approx(float((changed - exact).norm() / exact.norm()), rel=0.02)


def test_lyapunov_grows_its_error_by_the_exponent():
    monitor, state = build("monitor", "lyapunov:tau=1,max_gap=100,warmup=2"), {}
    out = []
    for error in (0.1, 0.2, 0.2, 0.2, 0.2):
        flush = type("F", (), {"state": state, "error": torch.tensor(error)})()
        out.append(monitor.judge(flush))
        if len(out) == 2:
            assert state["exponent"] == pytest.approx(math.log(2), rel=1e-3)
    assert [d.error_estimate for d, _ in out][2:4] == pytest.approx([0.4, 0.8], rel=1e-3)
    assert [e is None for _, e in out] == [False, False, True, True, False], "1.6 would pass tau: measured again"


def test_stability_raises_while_attention_moves_and_after_a_collapse():
    k, v, q = spoken(1, 700)
    calm = filled(n=700, data=(k, v, 1e-3 * q), monitor="stability", piece=36)[0]
    assert not any(raised(calm))
    sharp = 1e-3 * q
    sharp[:, :, 400:] = 40 * k.repeat_interleave(2, 1)[:, :, 400:]
    after = filled(n=700, data=(k, v, sharp), monitor="stability:alpha=1", piece=36)[0]
    whys = [d["why"] for d in after.policy.decisions]
    assert whys.count("a head's entropy collapsed") == 2
    assert after.nbytes > calm.nbytes


# -- in models


PIPELINES = {
    "palm tiered lyapunov": dict(scorer="palm", strategy="tiered", monitor="lyapunov:tau=0.2"),
    "bsa delta stability": dict(scorer="bsa", strategy="delta:block=16", monitor="stability"),
    "sheaf delta2 lyapunov": dict(scorer="sheaf", strategy="delta2:block=16", monitor="lyapunov:tau=0.04,warmup=1"),
    "sheaf": dict(scorer="sheaf"),
    "window": dict(scorer="bsa", strategy="window:density=1", monitor="stability:flush_tau=0"),
}


MODES = {
    "greedy": {},
    "beam": dict(num_beams=3),
    "sampled returns": dict(do_sample=True, num_return_sequences=3),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "chunked prefill": dict(prefill_chunk_size=16),
    "left padding": {},
}


def run(model, config, ids, fused, **kw):
    """Tokens and cache of a generation; nothing is left patched. Not ``fused``: by transformers' attention that makes dense values."""
    was = model.config._attn_implementation
    handle = tqai.apply(model, config) if fused else None
    if not fused:
        model.set_attn_implementation("eager")
    cache = handle.cache() if handle else tqai.KVCache(model.config, config)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.generate(ids, past_key_values=cache, **{"max_new_tokens": 60, "do_sample": False, **kw}), cache
        finally:
            if handle:
                handle.remove()
            model.set_attn_implementation(was)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PIPELINES)
def test_fused_tokens_are_those_of_the_dense_path(name, mode, qwen):
    config, ids, kw = tqai.Config(**{**BASE, "codec": "turbo:bits=4"}, **PIPELINES[name]), prompt(), dict(MODES[mode])
    if mode == "prompt lookup":
        ids = ids[:1]
    if mode == "left padding":
        kw["attention_mask"] = torch.ones_like(ids)
        kw["attention_mask"][0, :9] = 0
    fused, cache = run(qwen, config, ids, True, **kw)
    dense, other = run(qwen, config, ids, False, **kw)
    assert torch.equal(fused, dense)
    assert cache.materialised == 0
    assert other.materialised > 0
    assert all(layer.kv.packed > 0 for layer in cache.packed_layers)
    assert [d["action"] for d in cache.report().decisions] == [d["action"] for d in other.report().decisions]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_cache_on_disk_is_continued(name, qwen, tmp_path):
    ids, path = prompt(length=150), tmp_path / "prompt.safetensors"
    with tqai.apply(qwen, tqai.Config(**BASE, **PIPELINES[name])) as handle:
        cache = handle.cache()
        qwen(ids, past_key_values=cache)
        cache.save(path)
        more = torch.cat([ids, prompt(length=5, seed=9)], dim=1)
        straight = qwen.generate(more, past_key_values=cache, max_new_tokens=60, do_sample=False)
        again = handle.load(path)
        assert torch.equal(qwen.generate(more, past_key_values=again, max_new_tokens=60, do_sample=False), straight)
        assert again.nbytes == cache.nbytes
        assert again.report().per_site == cache.report().per_site


def test_names_in_a_file_stay():
    """Files that older versions wrote must load."""
    tensors, header = filled(scorer="palm", strategy="delta:block=16", monitor="lyapunov:tau=10")[0].state()
    assert set(header) == {"length", "segments", "fine", "exact_why", "plan", "bits_v", "policy"}
    assert set(header["policy"]) == {"states", "gate", "residual", "decisions", "lead", "read"}
    rows = {f"{kind}.0.{part}_{of}" for kind in ("segments", "fine") for part in ("codes", "gain") for of in "kv"}
    own = {f"policy.{name}" for name in ("tier", "codes", "gain", "queries", "scorer.mean", "scorer.spread")}
    assert set(tensors) == {"keys", "values", "mean", "scale"} | rows | own
    kv = filled(n=30)[0]
    assert set(kv.state()[0]) == {"keys", "values", "_q2"}
    assert "policy" not in kv.state()[1]


def test_damaged_files_are_named():
    for stages, field in (
        (dict(strategy="tiered"), "policy.tier"),
        (dict(strategy="delta:block=16"), "policy.codes"),
        (dict(strategy="tiered"), "fine.0.gain_v"),
    ):
        kv, *_ = filled(**stages)
        tensors, header = kv.state()
        kv.restore(tensors, header)
        with pytest.raises(ValueError, match=field.replace(".", r"\.")):
            kv.restore({k: v for k, v in tensors.items() if k != field}, header)


def test_skipped_layers_are_exact_and_the_report_tells_decisions(qwen):
    config = tqai.Config(**BASE, skip_layers=(0,), scorer="palm", strategy="delta:block=16", monitor="lyapunov:tau=0.2")
    with tqai.apply(qwen, config) as handle:
        cache = handle.cache()
        qwen(prompt(length=180), past_key_values=cache)
    report = cache.report()
    assert list(report.per_site) == ["attn.1"]
    site = report.per_site["attn.1"]
    assert {"bits_k", "bits_v", "share_fine", "predicted", "residual_energy", "flushes", "flushes_raised"} <= site.keys()
    assert {d["model"] for d in report.decisions} == {"attn.1"}
    assert {"attn.0"} <= {f["where"] for f in report.fallbacks}
    assert "| pack |" in report.to_markdown() or "| raise |" in report.to_markdown()
    cache.reset()
    assert cache.report().decisions == []


def test_softcapped_models_predict_before_the_cap():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**{**SMALL, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 24})).eval()
    config, ids = tqai.Config(**{**BASE, "codec": "turbo:bits=8"}, strategy="delta2:block=16"), prompt(length=150)
    with tqai.apply(model, config) as handle:
        cache = handle.cache()
        model(ids[:, :120], past_key_values=cache)
        for layer in cache.packed_layers:
            layer.kv.policy.predicts = True if layer.kv.policy.predicts else layer.kv.policy.predicts
        fused = model(ids[:, 120:], past_key_values=cache).logits
    model.set_attn_implementation("eager")
    exact = model(ids).logits[:, 120:]
    assert cache.materialised == 0
    assert torch.allclose(fused, exact, atol=2e-2)


def test_window_by_an_attention_that_is_not_ours_reads_all(qwen, monkeypatch):
    monkeypatch.setattr(qwen.config, "_attn_implementation_internal", "eager")
    config = tqai.Config(**{**BASE, "codec": "turbo:bits=8"}, strategy="window:density=0.1")
    cache = tqai.KVCache(qwen.config, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwen(prompt(length=180), past_key_values=cache)
        got = qwen(prompt(length=1, seed=3), past_key_values=cache).logits
    exact = qwen(torch.cat([prompt(length=180), prompt(length=1, seed=3)], 1)).logits[:, -1:]
    assert torch.allclose(got, exact, atol=0.3)
    assert cache.report().per_site["attn.0"]["share_read"] == 1.0


@pytest.mark.parametrize(
    "stages, words",
    [
        (dict(scorer="snr"), ["snr", "noise schedule", "kv"]),
        (dict(strategy="delta2:cfg=difference"), ["cfg", "guidance"]),
        (dict(strategy="tiered:low=4"), ["low=4", "turbo:bits=4"]),
        (dict(strategy="tiered:high=7"), ["high=7", "2, 3, 4, 5, 6, 8"]),
        (dict(strategy="window:block=24"), ["block=24", "16, 32 or 64"]),
        (dict(strategy="delta:block=20"), ["block=20", "16, 32, 64, 128"]),
    ],
)
def test_bad_input_says_what_and_the_cure(stages, words):
    with pytest.raises(ValueError) as error:
        tqai.Config(level="kv", **stages)
    for word in words:
        assert word in str(error.value)


def test_native_ran(qwen):
    """The kernel, where there is a compiler, takes tiers, predictions and reading."""
    if not native.ready():
        pytest.skip(native.status())
    ran, run_ = [], native._run
    for stages in (dict(strategy="tiered"), dict(strategy="delta:block=16"), dict(strategy="window", scorer="bsa")):
        kv, *_ = filled(**stages)
        ran.clear()
        native._run = lambda *a: ran.append(1) or run_(*a)
        try:
            attend(torch.randn(2, 4, 1, 32), kv, scaling=0.2)
        finally:
            native._run = run_
        assert len(ran) == len(kv.tiers())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_on_axes_of_their_own(strategy):
    """Base rows keep them, fine rows are plain."""
    k, _, q = spoken(2, 700, d=64)
    g = torch.Generator().manual_seed(2)
    v = torch.randn(2, 2, 700, 6, generator=g) @ torch.randn(1, 2, 6, 64, generator=g) + 0.1 * torch.randn(2, 2, 700, 64, generator=g)
    kv, *_ = filled(n=700, data=(k, v, q), codec="turbo:bits=4", strategy=strategy, scorer="palm", monitor=SOME, piece=350)
    assert kv.basis is not None
    assert kv.segments
    assert bool(kv.fine)
    same(torch.randn(2, 4, 1, 64), kv)
    same(torch.randn(2, 4, 3, 64), kv)
    tensors, header = kv.state()
    kv.crop(300)
    same(torch.randn(2, 4, 1, 64), kv)
    kv.restore(tensors, header)
    same(torch.randn(2, 4, 1, 64), kv)


@pytest.mark.parametrize("native_too", [True, False])
def test_blocks_that_are_not_read_weigh_nothing_under_a_softcap(native_too):
    kv, *_ = filled(n=700, batch=1, strategy="window:density=0.25,block=16")
    q = 3 * torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(3))
    (tier,) = kv.tiers()
    (change,) = kv.policy.adjust((q * 0.2).reshape(1, 2, 2, 32), [tier], 1)
    seen = torch.ones(1, 2, 1, 700, dtype=torch.bool)
    seen[:, :, 0, 4 : 4 + kv.packed] = change.read.repeat_interleave(16, 2)
    k, v, seen = (x.repeat_interleave(2, 1) for x in (kv.dense("k"), kv.dense("v"), seen))
    want = (2 * (q @ k.mT * 0.2 / 2).tanh()).masked_fill(~seen, float("-inf")).softmax(-1) @ v
    assert torch.allclose(attend(q, kv, scaling=0.2, softcap=2.0, native=native_too), want, atol=3e-4)
