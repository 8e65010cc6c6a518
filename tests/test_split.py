"""Values on their own axes: more bits where their energy lies."""

from __future__ import annotations

import copy

import pytest
import torch

from tqai_core.attention.backends import native
from tqai_core.attention.packed import attend
from tqai_core.codecs.rows import rows
from tqai_core.codecs.split import Split, axes, plan, reflect
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.segments import Plan

CPU = torch.device("cpu")


def falling(b=2, h=2, n=600, d=64, seed=0, fall=6.0):
    """Values whose energy lies along a few directions, other ones in each head."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(h, d, d, generator=g))[0]
    return (torch.randn(b, h, n, d, generator=g) * torch.linspace(0, -fall, d).exp()) @ turn


def filled(v, bits=4, recent=32):
    g = torch.Generator().manual_seed(1)
    kv = PackedKV(Plan(bits, bits, recent=recent))
    kv.append(torch.randn(v.shape, generator=g), v)
    kv.observe(torch.randn(v.shape[0], 2 * v.shape[1], v.shape[2], v.shape[3], generator=g))
    kv.settle()
    return kv


def nmse(y, x):
    return float((y - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("d", [64, 96, 128])
def test_rounded_reflections_are_orthogonal_and_find_the_subspace(d):
    v = falling(d=d)
    pooled = v.transpose(0, 1).flatten(1, 2)
    basis = axes(pooled.mT @ pooled, 32)
    assert basis.dtype == torch.int8
    assert basis.shape == (2, 32, d)
    y = reflect(v, basis)
    assert torch.allclose(y.norm(dim=-1), v.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(reflect(y, basis, back=True), v, atol=1e-4)
    best = torch.linalg.eigvalsh(pooled.mT @ pooled)[:, -32:].sum(1) / pooled.square().sum((1, 2))
    share = y[..., :32].square().sum((0, 2, 3)) / y.square().sum((0, 2, 3))
    assert bool((share > best - 2e-3).all())


@pytest.mark.parametrize("d", [64, 128])
def test_less_error_in_no_more_bytes(d):
    v = falling(b=1, n=2048, d=d)
    bits, basis = plan(v, 4, 2048)
    coder, plain = Split(d, bits, basis, 0), rows(d, 4, 0, CPU)
    codes, gain = coder.encode(v)
    assert codes.shape == (1, 2, 2048, coder.row_bytes)
    assert gain.shape == (1, 2, 2048, 2)
    assert codes.nbytes + gain.nbytes + basis.nbytes <= sum(x.nbytes for x in plain.encode(v))
    assert nmse(coder.decode(codes, gain), v) < 0.6 * nmse(plain.decode(*plain.encode(v)), v)
    assert torch.allclose(coder.unrotate(coder.rotate(v)), v, atol=1e-4)


def test_a_token_that_leaves_the_subspace_is_still_coded():
    v = falling(b=1, n=2048)
    bits, basis = plan(v, 4, 2048)
    stray = 50 * torch.randn(1, 2, 8, 64, generator=torch.Generator().manual_seed(3))
    coder = Split(64, bits, basis, 0)
    assert nmse(coder.decode(*coder.encode(stray)), stray) < 0.12


def test_values_of_equal_energy_and_short_samples_stay_plain():
    g = torch.Generator().manual_seed(0)
    assert plan(torch.randn(1, 2, 2048, 64, generator=g), 4, 2048) is None
    assert plan(falling(b=1, n=100), 4, 2048) is None
    assert plan(falling(b=1, n=2048), 8, 2048) is None
    assert filled(torch.randn(1, 2, 600, 64, generator=g)).basis is None


def test_the_cache_takes_axes_and_attention_reads_them_in_place():
    v = falling()
    kv = filled(v)
    assert kv.basis is not None
    assert len(kv.bits_v) == 2
    assert kv.nbytes > sum(t.nbytes for s in kv.segments for t in vars(s).values()) + kv.basis.nbytes - 1
    q = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(5))
    k, dense = kv.dense("k"), kv.dense("v")
    mask = torch.arange(600)[None] <= torch.arange(597, 600)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), dense.repeat_interleave(2, 1), mask)
    kv.decoded = 0
    for use in (False, True):
        got = attend(q, kv, scaling=0.125, native=use)
        assert float((got - want).norm() / want.norm()) < 2e-4, native.status()
    assert kv.decoded == 0


def test_axes_survive_batch_changes_crops_files_and_a_move():
    kv = filled(falling())
    tensors, header = kv.state()
    again = PackedKV(kv.plan)
    again.restore(tensors, header)
    assert torch.equal(again.dense("v"), kv.dense("v"))
    assert again.nbytes == kv.nbytes
    picked = copy.copy(again)
    picked.map_batch(lambda x: x.index_select(0, torch.tensor([1, 1, 0])))
    picked.move("cpu")
    assert torch.equal(picked.dense("v"), kv.dense("v")[[1, 1, 0]])
    picked.crop(200)
    assert torch.equal(picked.dense("v"), kv.dense("v")[[1, 1, 0], :, :400])
    with pytest.raises(ValueError, match="basis"):
        PackedKV(kv.plan).restore({name: t for name, t in tensors.items() if name != "basis"}, header)
    kv.clear()
    assert kv.basis is None
    assert kv.bits_v == (4,)


def test_damaged_axes_in_a_file_are_refused():
    kv = filled(falling())
    tensors, header = kv.state()
    basis = tensors["basis"]
    first = tensors["segments.0.gain_v"]
    for change, bits in (
        ({"basis": basis.float()}, None), ({"basis": basis[:1]}, None), ({"basis": basis[..., :-8]}, None),
        ({"basis": basis[:, :-1]}, None), ({"basis": basis[:, :0]}, None), ({"basis": torch.cat([basis] * 3, 1)[:, :40]}, None),
        ({"basis": basis.clone().index_fill_(1, torch.tensor([0]), 0)}, None), ({}, [4]), ({}, [3, 7]), ({}, [9, 1]),
        ({"segments.0.gain_v": first[..., 0].contiguous()}, None), ({"segments.0.gain_v": torch.cat([first, first[..., :1]], -1)}, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"basis|gain_v"):
            PackedKV(kv.plan).restore({**tensors, **change}, header | ({"bits_v": bits} if bits else {}))
    plain, own = PackedKV(kv.plan), {name: x for name, x in tensors.items() if name != "basis"}
    with pytest.raises(ValueError, match="basis"):
        plain.restore(own, {**header, "bits_v": [3]})
