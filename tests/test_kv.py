"""The packed cache and its attention, on torch alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_core.attention import eager
from tqai_core.attention.packed import attend
from tqai_core.codecs.rows import BITS, Scratch, rows
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.segments import SEGMENT, Plan

CPU = torch.device("cpu")


def tokens(g, b, h, n, d, dtype=torch.float32, loud=True):
    """Keys with an offset and channels of unequal size, as real ones have them; plain values."""
    k = torch.randn(b, h, n, d, generator=g)
    if loud:
        k = k * torch.linspace(0.3, 4, d) + 2
    return k.to(dtype), torch.randn(b, h, n, d, generator=g).to(dtype)


def filled(plan, n=400, b=2, h=2, d=64, dtype=torch.float32, group=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    kv = PackedKV(plan)
    k, v = tokens(g, b, h, n, d, dtype)
    kv.append(k, v)
    kv.observe(torch.randn(b, h * group, n, d, generator=g).to(dtype))
    kv.settle()
    return kv, k, v


def reference(q, k, v, mask=None, scaling=None):
    group = q.shape[1] // k.shape[1]
    n, m = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.arange(m)[None] <= torch.arange(m - n, m)[:, None]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, scale=scaling)


# -- rows


@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_rows_error_bytes_and_domain(bits, d, lloyd_max):
    coder = rows(d, bits, 0, CPU)
    x = torch.randn(3, 1000, d, generator=torch.Generator().manual_seed(1))
    codes, gain = coder.encode(x)
    assert codes.shape == (3, 1000, d * bits // 8)
    assert codes.dtype == torch.uint8
    assert gain.dtype == torch.bfloat16
    y = coder.decode(codes, gain)
    most = lloyd_max[7] if bits == 8 else 1.02 * lloyd_max[bits]  # 8 bits are evenly spaced levels, which lose less than one bit
    assert float((x - y).square().sum() / x.square().sum()) < most
    q = torch.randn(5, d)
    there = coder.rotate(q) @ (coder.lookup(codes[0]) * gain[0].float()[:, None]).T
    assert torch.allclose(there, q @ y[0].T, atol=2e-4)
    assert torch.equal(coder.lookup(codes), coder.lookup(codes, Scratch()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_bytes_times_a_step(bits):
    coder = rows(64, bits, 0, CPU)
    codes, _ = coder.encode(torch.randn(7, 64))
    small = coder.lookup_bytes(codes, Scratch())
    assert small.dtype == torch.int8
    assert torch.equal((small.float() + (0.5 if bits == 8 else 0)) * coder.step, coder.lookup(codes))
    wide = torch.cat([codes, codes], 1)[:, : codes.shape[1]]  # rows that lie apart, as those of split values do
    assert torch.equal(coder.lookup_bytes(wide), small)


@pytest.mark.parametrize("exact", [100, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_products_of_bytes_and_of_floats_agree(bits, exact, monkeypatch):
    """To the 15 bits of the digits, where a score is a sum of both signs; a query of zeros and one that is no number included."""
    g = torch.Generator().manual_seed(0)
    kv = PackedKV(Plan(bits, bits, recent=exact))
    k, v = tokens(g, 2, 2, 2500, 64)
    kv.append(k.bfloat16(), v.bfloat16())
    kv.settle()
    q = torch.randn(2, 4, 3, 64, generator=g).bfloat16()
    q[0, 0] *= 30
    q[0, 1] = 0
    q[1, 3, 2, 5] = float("nan")
    asked = []
    make = eager.Queries.__init__
    monkeypatch.setattr(eager.Queries, "__init__", lambda self, *a: (make(self, *a), asked.append(self.unit))[0])
    outs = []
    for has in (False, True):
        monkeypatch.setattr(eager, "multiplies_bytes", lambda has=has: has)
        outs.append(attend(q, kv, scaling=0.125, native=False).float())
    assert [unit is not None for unit in asked] == [False, bits not in (5, 6)]
    assert outs[1][1, 3, 2].isnan().all()
    assert int(outs[1].isnan().sum()) == 64
    want, got = (x.nan_to_num().flatten(0, 2) for x in outs)
    assert float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-9)).max()) < 0.01  # bf16 rounds to 0.004
    attend(q.float(), kv, scaling=0.125, native=False)
    assert asked[-1] is None, "queries of 32 bits keep them"


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_of_a_row_are_as_documented(bits):
    """What a native kernel is written against."""
    coder = rows(64, bits, 0, CPU)
    codes, _ = coder.encode(torch.randn(7, 64))
    row = codes[3].tolist()
    if bits >= 4 and bits < 8:
        index = [row[j // 2] >> 4 * (j % 2) & 15 for j in range(64)]
        if bits == 5:
            index = [low | (row[32 + j // 8] >> j % 8 & 1) << 4 for j, low in enumerate(index)]
        if bits == 6:
            index = [low | (row[32 + j // 4] >> 2 * (j % 4) & 3) << 4 for j, low in enumerate(index)]
    elif bits == 2:
        index = [row[j // 4] >> 2 * (j % 4) & 3 for j in range(64)]
    elif bits == 3:
        index = [(row[j // 4] >> 2 * (j % 4) & 3) | (row[16 + j // 8] >> j % 8 & 1) << 2 for j in range(64)]
    else:
        index = row
    assert torch.equal(coder.level[torch.tensor(index)], coder.lookup(codes)[3])


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_score_with_the_row_itself_is_kept(bits):
    """The error of a row is at right angles to it, up to the rounding of the gain: attention to a key that a query looks for is not
    lowered. A gain by least squares would lower it by the error's energy, a hundredth at 4 bits."""
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 2000)[:, None]
    coder = rows(64, bits, 0, torch.device("cpu"))
    y = coder.decode(*coder.encode(x))
    along = (x * y).sum(-1) / x.square().sum(-1)
    assert (along - 1).abs().max() < 2**-8, "half a step of bf16"
    assert abs(float(along.mean()) - 1) < 2e-4


def test_rows_bad_input():
    with pytest.raises(ValueError, match="multiple of 8"):
        rows(20, 4, 0, CPU)
    with pytest.raises(ValueError, match="2, 3, 4, 5, 6, 8 bits"):
        rows(64, 7, 0, CPU)


def test_zero_and_huge_vectors_survive():
    for bits in BITS:
        coder = rows(64, bits, 0, CPU)
        x = torch.cat([torch.zeros(1, 64), torch.randn(1, 64) * 1e15, torch.randn(1, 64) * 1e-20])
        y = coder.decode(*coder.encode(x))
        assert torch.equal(y[0], torch.zeros(64))
        assert float((y[1:] - x[1:]).norm(dim=-1).div(x[1:].norm(dim=-1)).max()) < 0.5


# -- the cache


def test_what_is_exact_and_what_is_packed():
    kv, k, v = filled(Plan(sink=4, recent=32))
    assert kv.packed == 400 - 36
    dense = kv.dense("k")
    assert torch.equal(dense[:, :, :4], k[:, :, :4])
    assert torch.equal(dense[:, :, -32:], k[:, :, -32:])
    assert not torch.equal(dense[:, :, 4:-32], k[:, :, 4:-32])
    error = (dense - k)[:, :, 4:-32]
    assert float(error.square().sum() / (k - k.mean(2, keepdim=True)).square().sum()) < 0.012
    assert torch.equal(kv.dense("v")[:, :, -32:], v[:, :, -32:])


def test_nothing_is_packed_before_the_statistics():
    kv, k, _ = filled(Plan(recent=32), n=255)
    assert kv.packed == 0
    assert torch.equal(kv.dense("k"), k)
    kv.append(k[:, :, :1], k[:, :, :1])
    kv.settle()
    assert kv.packed == 256 - 36
    plain, _, _ = filled(Plan(recent=32, calibrate=0), n=100)
    assert plain.packed == 64
    assert plain.statistics.mean is None


def test_a_token_is_packed_once_and_never_again():
    kv, _, _ = filled(Plan(recent=32))
    before = kv.dense("k")[:, :, :368]
    g = torch.Generator().manual_seed(5)
    for _ in range(3 * kv.plan.flush):
        kv.append(*tokens(g, 2, 2, 1, 64))
        kv.settle()
    assert kv.packed > 400
    assert torch.equal(kv.dense("k")[:, :, :368], before)


@pytest.mark.parametrize(("recent", "step"), [(0, 32), (12, 16), (15, 16), (16, 32), (28, 32)])
def test_tokens_leave_a_short_window_in_small_steps(recent, step):
    kv, _, _ = filled(Plan(recent=recent, calibrate=0))
    packed = kv.packed
    for waiting in range(1, step + 1):
        kv.append(*tokens(torch.Generator().manual_seed(0), 2, 2, 1, 64))
        kv.settle()
        assert kv.packed == packed + (step if waiting == step else 0)


def test_outlier_channels_and_offsets_cost_nothing():
    """Keys with channels 50 times as large, queries with them as much smaller: the same scores, the same codes."""
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 300, 64, generator=g), tokens(g, 1, 2, 300, 64, loud=False)
    factor = torch.ones(64)
    factor[[3, 35, 10, 42]] = 50.0
    outs = []
    for change, offset in ((torch.ones(64), 0.0), (factor, 0.0), (torch.ones(64), 300.0)):
        kv = PackedKV(Plan(recent=32))
        kv.append(k * change + offset, v)
        kv.observe(q / change)
        kv.settle()
        outs.append(attend(q[:, :, -1:] / change, kv, scaling=0.125))
    exact = reference(q[:, :, -1:], k, v)
    error = [float((out - exact).norm() / exact.norm()) for out in outs]
    assert error[1] < error[0] * 1.1
    assert error[2] < error[0] * 1.1
    plain = PackedKV(Plan(recent=32, calibrate=0))
    plain.append(k * factor, v)
    plain.settle()
    assert float((attend(q[:, :, -1:] / factor, plain, scaling=0.125) - exact).norm() / exact.norm()) > 3 * error[0]


def test_bytes_are_walked_and_within_the_promise():
    for d, limit in ((64, 4.6), (128, 4.45)):
        kv, _, _ = filled(Plan(4, 4, sink=4, recent=32), n=2048, b=1, d=d, dtype=torch.bfloat16)
        assert 8 * kv.nbytes / (2 * 2 * d * 2048) <= limit
        assert kv.nbytes >= 2048 * 2 * d * 2 * 4 // 8


def test_growing_copies_a_tail_at_most():
    kv, _, _ = filled(Plan(recent=32), n=3000, b=1)
    first = kv.segments[0].codes_k.data_ptr()
    assert max(len(s) for s in kv.segments) == SEGMENT
    g = torch.Generator().manual_seed(5)
    for _ in range(4):
        kv.append(*tokens(g, 1, 2, 40, 64))
        kv.settle()
    assert kv.segments[0].codes_k.data_ptr() == first
    assert sum(len(s) for s in kv.segments) + kv.keys.shape[2] == kv.length == 3160


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(1, 90), st.integers(-60, -1)), min_size=1, max_size=8),
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    sink=st.integers(0, 6),
    recent=st.integers(0, 40),
    calibrate=st.sampled_from([0, 20, 100]),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_history_reads_the_same_in_place_and_dense(steps, bits, sink, recent, calibrate, group, seed):
    """Appends and crops in any order: lengths add up, exact ends are exact, fused equals dense."""
    g = torch.Generator().manual_seed(seed)
    kv, b, h, d = PackedKV(Plan(*bits, sink=sink, recent=recent, calibrate=calibrate)), 2, 2, 32
    k_all = torch.zeros(b, h, 0, d)
    for n in steps:
        if n < 0:
            n = min(-n, kv.length)
            kv.crop(n)
            k_all = k_all[:, :, : k_all.shape[2] - n]
            continue
        k, v = tokens(g, b, h, n, d)
        q = torch.randn(b, h * group, n, d, generator=g)
        kv.append(k, v)
        k_all = torch.cat([k_all, k], 2)
        out = attend(q, kv, scaling=0.2)
        assert torch.allclose(out, reference(q, kv.dense("k"), kv.dense("v"), scaling=0.2), atol=3e-4)
        kv.observe(q)
        kv.settle()
    assert kv.length == k_all.shape[2]
    if kv.length:
        dense = kv.dense("k")
        assert dense.shape == k_all.shape
        front = min(sink, kv.length)
        assert torch.equal(dense[:, :, :front], k_all[:, :, :front])
        assert float((dense - k_all).abs().max()) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_softcap_and_the_weight_without_value(dtype):
    kv, _, _ = filled(Plan(recent=32), dtype=dtype)
    q = torch.randn(2, 4, 3, 64).to(dtype)
    tol = dict(atol=2e-4) if dtype == torch.float32 else dict(atol=2e-2)
    k, v = kv.dense("k"), kv.dense("v")
    seen = torch.arange(400)[None] <= torch.arange(397, 400)[:, None]
    padded = seen[None, None].repeat(2, 1, 1, 1)
    padded[0, :, :, :90] = False
    out = attend(q, kv, scaling=0.125, mask=padded)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), reference(q, k, v, padded), **tol)
    added = torch.zeros(2, 1, 3, 400).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert torch.allclose(attend(q, kv, scaling=0.125, mask=added).float(), reference(q, k, v, padded), **tol)
    heads = seen[None, None].repeat(2, 4, 1, 1)
    heads[:, 1, :, 100:200] = False
    assert torch.allclose(attend(q, kv, scaling=0.125, mask=heads).float(), reference(q, k, v, heads), **tol)

    scores = (q.float() @ k.float().repeat_interleave(2, 1).transpose(-1, -2)) * 0.125
    capped = (10 * (scores / 10).tanh()).masked_fill(~seen, float("-inf")).softmax(-1) @ v.float().repeat_interleave(2, 1)
    assert torch.allclose(attend(q, kv, scaling=0.125, softcap=10.0).float(), capped, **tol)
    aux = torch.tensor([0.5, 4.0, -2.0, 9.0])
    with_aux = torch.cat([scores.masked_fill(~seen, float("-inf")), aux.view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    assert torch.allclose(attend(q, kv, scaling=0.125, aux=aux).float(), with_aux @ v.float().repeat_interleave(2, 1), **tol)


def test_a_row_that_may_see_nothing_is_zero():
    kv, _, _ = filled(Plan(recent=32))
    mask = torch.ones(2, 1, 1, 400, dtype=torch.bool)
    mask[1] = False
    out = attend(torch.randn(2, 4, 1, 64), kv, scaling=0.125, mask=mask)
    assert torch.equal(out[1], torch.zeros(4, 1, 64))
    assert out[0].abs().min() > 0


def test_values_without_weight_are_not_looked_up(monkeypatch):
    """Sparse V: segments whose share is below a millionth do not change the result."""
    g = torch.Generator().manual_seed(0)
    kv = PackedKV(Plan(recent=32, calibrate=0))
    direction = F.normalize(torch.randn(64, generator=g), dim=0)
    k = torch.randn(1, 1, 3000, 64, generator=g) * 0.1
    k[:, :, -20:] += 40 * direction
    kv.append(k, torch.randn(1, 1, 3000, 64, generator=g))
    kv.settle()
    coder, looked = kv.coders()[1], []
    monkeypatch.setattr(coder, "lookup", lambda codes, scratch=None: looked.append(len(codes)) or type(coder).lookup(coder, codes, scratch))
    monkeypatch.setattr(eager, "GROUP", 1024)  # asked where there are several groups
    q = (10 * direction).view(1, 1, 1, 64)
    out = attend(q, kv, scaling=0.125, native=False)
    assert looked == []
    monkeypatch.undo()
    assert torch.allclose(out, reference(q, kv.dense("k"), kv.dense("v")), atol=1e-4)


@pytest.mark.parametrize("native", [False, True])
def test_large_values_of_little_weight_count(native):
    """Each segment has a ten-thousandth of the weight, far above a millionth, and a third of the result."""
    g = torch.Generator().manual_seed(0)
    kv = PackedKV(Plan(recent=32, calibrate=0))
    direction = F.normalize(torch.randn(64, generator=g), dim=0)
    k, v = torch.randn(2, 1, 1, 3000, 64, generator=g) * 0.1
    k[:, :, -20:] += 10.4 * direction
    v[:, :, :-32] += 1000
    kv.append(k, v)
    kv.settle()
    q = (10 * direction).expand(1, 16, 1, 64)  # so many heads that the segments come in several groups
    want = reference(q, kv.dense("k"), kv.dense("v"))
    assert 0.2 < want.min() < want.max() < 2
    assert torch.allclose(attend(q, kv, scaling=0.125, native=native), want, rtol=0.01)


def test_many_queries_go_in_blocks_and_agree():
    kv, _, _ = filled(Plan(recent=32), n=1500, b=1)
    q = torch.randn(1, 4, 700, 64)
    assert torch.allclose(attend(q, kv, scaling=0.125), reference(q, kv.dense("k"), kv.dense("v")), atol=3e-4)


def test_batch_changes_are_exact():
    kv, _, _ = filled(Plan(recent=32), b=3)
    dense = kv.dense("k")
    kv.map_batch(lambda x: x.index_select(0, torch.tensor([2, 0, 0])))
    assert torch.equal(kv.dense("k"), dense[[2, 0, 0]])
    kv.map_batch(lambda x: x.repeat_interleave(2, 0))
    assert torch.equal(kv.dense("k"), dense[[2, 2, 0, 0, 0, 0]])
    kv.map_batch(lambda x: x[torch.tensor([0])])
    assert torch.equal(kv.dense("k"), dense[[2]])


def test_each_sequence_has_its_own_statistics():
    """What else is in the batch does not change a sequence."""
    one, k, v = filled(Plan(recent=32), b=2)
    alone = PackedKV(Plan(recent=32))
    alone.append(k[:1], v[:1])
    g = torch.Generator().manual_seed(0)
    tokens(g, 2, 2, 400, 64)
    alone.observe(torch.randn(2, 4, 400, 64, generator=g)[:1])
    alone.settle()
    assert torch.allclose(one.dense("k")[:1], alone.dense("k"), atol=1e-5)


def test_crop_to_nothing_and_beyond():
    kv, k, v = filled(Plan(recent=32))
    with pytest.raises(ValueError, match="keeps 400"):
        kv.crop(401)
    kv.crop(399)
    assert torch.equal(kv.dense("k"), k[:, :, :1])
    kv.crop(1)
    assert kv.length == 0
    kv.append(k, v)
    assert kv.length == 400


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers_stay_exact(bad):
    kv, _, _ = filled(Plan(recent=32))
    packed = kv.packed
    g = torch.Generator().manual_seed(3)
    k, v = tokens(g, 2, 2, 200, 64)
    k[0, 0, 5, 5] = bad
    kv.append(k, v)
    kv.settle()
    assert kv.packed == packed
    assert "NaN or inf" in kv.exact_why
    assert kv.dense("k")[:, :, -200:].nan_to_num(7, 7, 7).equal(k.nan_to_num(7, 7, 7))
    fresh = PackedKV(Plan(recent=32))
    fresh.append(*[torch.full((1, 1, 300, 64), bad)] * 2)
    fresh.settle()
    assert fresh.packed == 0
    assert fresh.exact_why


def test_other_heads_or_batch_are_refused():
    kv, _, _ = filled(Plan(recent=32))
    for shape in ((1, 2, 1, 64), (2, 3, 1, 64), (2, 2, 1, 32)):
        with pytest.raises(ValueError, match="another model or batch"):
            kv.append(torch.zeros(shape), torch.zeros(shape))
    assert kv.length == 400
    with pytest.raises(ValueError, match="multiple"):
        attend(torch.zeros(2, 3, 1, 64), kv, scaling=1.0)


def test_state_round_trip_and_damage():
    kv, _, _ = filled(Plan(4, 3, recent=32))
    tensors, header = kv.state()
    again = PackedKV(Plan(4, 3, recent=32))
    again.restore(tensors, header)
    assert torch.equal(again.dense("k"), kv.dense("k"))
    assert torch.equal(again.dense("v"), kv.dense("v"))
    assert again.nbytes == kv.nbytes
    with pytest.raises(ValueError, match="same config"):
        PackedKV(Plan(4, 4, recent=32)).restore(tensors, header)
    with pytest.raises(ValueError, match=r"segments\.0\.gain_v"):
        again.restore({k: v for k, v in tensors.items() if k != "segments.0.gain_v"}, header)
    with pytest.raises(ValueError, match=r"segments\.0\.codes_k"):
        again.restore({**tensors, "segments.0.codes_k": tensors["segments.0.codes_k"][..., :-1]}, header)
    with pytest.raises(ValueError, match="length"):
        again.restore(tensors, {**header, "length": 3})
    cut = {name: x[:, :, :-1] if name.startswith("segments.0") and name.endswith("v") else x for name, x in tensors.items()}
    with pytest.raises(ValueError, match=r"segments\.0\.codes_v"):  # values of fewer tokens than keys
        again.restore(cut, header)
    for size in (0, 10 * SEGMENT):
        wrong = {
            name: x[:, :, :1].expand(-1, -1, size, *x.shape[3:]) if name.startswith("segments.0") else x for name, x in tensors.items()
        }
        with pytest.raises(ValueError, match=f"is of {size} tokens, a segment has {SEGMENT} at most"):
            again.restore(wrong, header)


@pytest.mark.parametrize("count", [0, 1, 9, 31, 32, 33, 64, 300, 363, 364, 365, 399])
def test_a_crop_leaves_the_tokens_before_it_as_they_were(count):
    kv, _, _ = filled(Plan(recent=32))
    before, packed = [kv.dense(which) for which in "kv"], kv.packed
    kv.crop(count)
    assert kv.length == 400 - count
    assert kv.packed == min(packed, max(packed - (count - 32), 0) if count > 32 else packed), "recent tokens go first"
    for which, x in zip("kv", before, strict=True):
        assert torch.equal(kv.dense(which), x[:, :, : 400 - count])


# -- padding in front


def padded(pads, n=400, chunks=(None,), added=False, plan=None, seed=3):
    """A cache of sequences that begin with padding, filled in chunks as a model does it; its keys, values, queries and mask."""
    g, b, longest = torch.Generator().manual_seed(seed), len(pads), n + max(pads)
    kv = PackedKV(plan or Plan(recent=32))
    k, v = tokens(g, b, 2, longest, 64)
    q = torch.randn(b, 4, longest, 64, generator=g)
    real = torch.arange(longest)[None] >= torch.tensor(pads)[:, None]
    seen = real[:, None, None] & (torch.arange(longest)[None] <= torch.arange(longest)[:, None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if added else seen
    edges = [0, *(edge for edge in chunks if edge is not None), longest]
    for a, z in itertools.pairwise(edges):
        kv.append(k[:, :, a:z], v[:, :, a:z])
        kv.see(mask[:, :, a:z, :z], z - a)
        kv.observe(q[:, :, a:z])
        kv.settle()
    return kv, k, v, q, mask


def alone(k, v, q, pads, i, plan=None):
    kv = PackedKV(plan or Plan(recent=32))
    kv.append(k[i : i + 1, :, pads[i] :], v[i : i + 1, :, pads[i] :])
    kv.observe(q[i : i + 1, :, pads[i] :])
    kv.settle()
    return kv


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("pads", [(9, 9), (9, 0), (0, 70), (1, 3), (500, 20)], ids=str)
def test_a_padded_sequence_is_held_as_it_is_alone(pads, added):
    """The sequence of most padding to the bit: statistics, sinks and codes; the others have statistics of as many tokens."""
    kv, k, v, q, mask = padded(pads, added=added)
    assert kv.pads.tolist() == list(pads)
    assert kv.most_pads == max(pads)
    last = q[:, :, -1:]
    out = attend(last, kv, scaling=0.125, mask=mask[:, :, -1:], native=False)
    for i, count in enumerate(pads):
        one = alone(k, v, q, pads, i)
        assert torch.equal(kv.keys[i, :, :4], one.keys[0, :, :4]), "sinks are real tokens"
        assert torch.equal(kv.keys[i, :, 4:], one.keys[0, :, 4:]), "the recent ones"
        own = k[i, :, count:]
        mean, scale = kv.statistics.mean[i], kv.statistics.scale[i]
        assert bool(((mean - own.mean(1, keepdim=True)).abs() < 5 * own.std(1, keepdim=True) / own.shape[1] ** 0.5).all())
        if count == max(pads):
            assert torch.equal(mean, one.statistics.mean[0])
        assert torch.allclose(scale, one.statistics.scale[0], rtol=1e-5 if count == max(pads) else 0.2)
        for which, exact in (("k", k), ("v", v)):
            dense, want = kv.dense(which)[i, :, count:], one.dense(which)[0]
            error = lambda x, exact=exact, i=i, count=count: float((x - exact[i, :, count:]).square().mean())
            assert error(dense) <= 1.15 * error(want), "at their own positions, no less exact"
            if count == max(pads):
                assert torch.allclose(dense, want, atol=1e-4)
        want, true = (
            attend(last[i : i + 1], one, scaling=0.125, native=False),
            reference(last[i : i + 1], own[None], v[i : i + 1, :, count:]),
        )
        assert float((out[i] - true[0]).norm()) < 1.3 * float((want - true).norm())
    assert not kv.dense("v")[0, :, : pads[0]].any() or pads[0] == 0 or not kv.moved, "padding is stored as nothing"


@pytest.mark.parametrize("chunks", [(5,), (9,), (12, 300), (100, 200, 300)], ids=str)
def test_padding_that_comes_in_chunks_is_counted_on(chunks):
    """A chunk may hold padding alone."""
    whole, parts = padded((9, 2)), padded((9, 2), chunks=chunks)
    assert parts[0].pads.tolist() == [9, 2]
    assert torch.equal(parts[0].keys[:, :, :4], whole[0].keys[:, :, :4])
    assert parts[0].packed == whole[0].packed
    error = lambda kv, k: float((kv.dense("k")[:, :, 9:] - k[:, :, 9:]).square().mean())
    assert error(parts[0], parts[1]) < 1.2 * error(whole[0], whole[1])


def test_padding_is_not_waited_with():
    """255 tokens with 9 of padding before them are too few for statistics that want 256."""
    for n, packed in ((255, 0), (256, 256 + 9 - 4 - 32)):
        assert padded((9, 0), n=n)[0].packed == packed


def test_what_tells_of_no_padding():
    g = torch.Generator().manual_seed(0)
    k, v = tokens(g, 2, 2, 20, 64)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    for mask in (None, causal, causal.expand(2, 4, 20, 20), causal[:, :, -1:], causal[0, 0], causal[..., :15]):
        kv = PackedKV(Plan(recent=32))
        kv.see(mask, 20)  # before anything is held
        kv.append(k, v)
        kv.see(mask, 20)
        assert kv.pads is None
        assert kv.most_pads == 0
    kv.see(causal & (torch.arange(20) >= 3), 20)  # one mask for the batch
    assert kv.pads.tolist() == [3, 3]
    kv.append(k, v)
    kv.see(torch.zeros(2, 1, 20, 40, dtype=torch.bool), 20)
    assert kv.pads.tolist() == [3, 3], "once every sequence has a token nothing is looked at"
    heads = PackedKV(Plan(recent=32))
    heads.append(k, v)
    heads.see(torch.stack([causal[0] & (torch.arange(20) >= n) for n in (3, 5)], 1), 20)
    assert heads.pads.tolist() == [3, 3], "what one head sees is no padding"


@pytest.mark.parametrize("left", [408, 300, 43, 14, 13, 12, 9, 5, 1, 0])
def test_a_padded_cache_is_cropped_at_any_place(left):
    kv, *_ = padded((9, 0))
    before = {which: kv.dense(which) for which in "kv"}
    length, packed = kv.length, kv.packed
    kv.crop(length - left)
    assert kv.packed == (0 if left < 13 else min(packed, left - 4)), "what stays is not unpacked"
    assert kv.length == left
    if left:
        for which, x in before.items():
            assert torch.allclose(kv.dense(which)[0, :, min(9, left) :], x[0, :, min(9, left) : left], atol=1e-5)
            assert torch.allclose(kv.dense(which)[1], x[1, :, :left], atol=1e-5)
        assert kv.pads.tolist() == [min(9, left), 0]
    else:
        assert kv.pads is None


def test_a_padded_cache_survives_a_change_of_its_batch_and_a_file():
    kv, _, _, q, mask = padded((9, 0, 70))
    want = attend(q[:, :, -1:], kv, scaling=0.125, mask=mask[:, :, -1:], native=False)
    tensors, header = kv.state()
    again = PackedKV(Plan(recent=32))
    again.restore(tensors, header)
    assert again.nbytes == kv.nbytes
    assert torch.equal(attend(q[:, :, -1:], again, scaling=0.125, mask=mask[:, :, -1:], native=False), want)
    alike = padded((9, 9))[0]
    PackedKV(Plan(recent=32)).restore(*alike.state())
    order = torch.tensor([2, 0])
    PackedKV(Plan(recent=32)).map_batch(lambda x: x[order])  # nothing is held yet
    again.map_batch(lambda x: x[order])
    assert again.pads.tolist() == [70, 9]
    assert torch.allclose(attend(q[order, :, -1:], again, scaling=0.125, mask=mask[order, :, -1:], native=False), want[order], atol=1e-5)


def test_other_value_dimension_non_contiguous_and_empty():
    g = torch.Generator().manual_seed(0)
    kv = PackedKV(Plan(recent=32))
    k = torch.randn(1, 400, 2, 64, generator=g).transpose(1, 2)
    v = torch.randn(1, 400, 2, 32, generator=g).transpose(1, 2)
    kv.append(k[:, :, :0], v[:, :, :0])
    assert kv.length == 0
    kv.append(k, v)
    kv.settle()
    out = attend(torch.randn(1, 2, 1, 64), kv, scaling=0.125)
    assert out.shape == (1, 2, 1, 32)
    assert kv.dense("v").shape == (1, 2, 400, 32)
