from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import tqai_core as tqai
from tqai_core.codecs import levels, packing, rotation
from tqai_core.codecs.scalar import scalar
from tqai_core.metrics import nmse
from tqai_core.registry import build, names
from tqai_core.types import Packed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(bits=st.integers(1, 8), d=st.integers(1, 70), n=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_packing_round_trip_every_width_and_odd_lengths(bits, d, n, seed):
    codes = torch.randint(0, 2**bits, (n, d), generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, math.ceil(d * bits / 8)), "really bit-packed"
    assert torch.equal(packing.unpack(packed, d, bits).long(), codes)
    table = scalar(bits, None, torch.device("cpu"))
    assert torch.equal(table.decode(packed, d), levels.lloyd_max(bits)[codes]), "unpacks and dequantises at once"


@pytest.mark.parametrize("bits, mse", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_levels_are_max_and_lloyds(bits, mse):
    """The figures of Max (1960), table I, for a Gaussian."""
    level = levels.lloyd_max(bits).double()
    t, p = levels._density(None)
    t, p = torch.tensor(t), torch.tensor(p)
    cell = torch.bucketize(t, (level[1:] + level[:-1]) / 2)
    assert float((p * (t - level[cell]).square()).sum()) == pytest.approx(mse, rel=3e-3)
    mean = torch.zeros_like(level).index_add_(0, cell, p * t) / torch.zeros_like(level).index_add_(0, cell, p)
    assert torch.allclose(mean, level, atol=1e-3), "a level is the mean of its cell"
    assert torch.equal(level, -level.flip(0))


@pytest.mark.parametrize("d", [1, 2, 3, 7, 16, 96, 128, 1024, 1536, 3072])
def test_rotation_is_orthogonal_and_the_same_for_a_seed(d):
    m = rotation.matrix(rotation.block_size(d), 3)
    assert torch.allclose(m @ m.T, torch.eye(len(m)), atol=1e-5)
    assert torch.equal(m, rotation.matrix.__wrapped__(rotation.block_size(d), 3))
    x = torch.randn(4, d)
    assert torch.allclose(rotation.unrotate(rotation.rotate(x, m), m), x, atol=1e-5)


@pytest.mark.parametrize(
    "bits, most", [(1, 0.365), (2, 0.1165), (3, 0.0342), (4, 0.0094), (5, 0.0026), (6, 0.0007), (7, 0.0002), (8, 5e-5)]
)
def test_turbo_error_and_bytes(bits, most):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 128, generator=g) * torch.exp(0.5 * torch.randn(4096, 1, generator=g))
    codec = tqai.codec(f"turbo:bits={bits},mean=never")
    packed = codec.encode(x)
    y = codec.decode(packed)
    assert float(((x - y).square().sum(-1) / x.square().sum(-1)).mean()) <= most
    gain = 2 if bits >= 7 else 1
    assert packed.nbytes == 4096 * (128 * bits // 8 + gain) + 8


@given(
    x=arrays(
        "float32",
        st.tuples(st.integers(0, 5), st.integers(1, 40)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_turbo_takes_any_finite_tensor(x, bits, dtype):
    x = torch.from_numpy(x)
    if dtype == torch.float16:
        x = x.clamp(-65504, 65504)
    x = x.to(dtype)
    codec = tqai.codec(f"turbo:bits={bits}")
    y = codec.decode(codec.encode(x))
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    if x.numel() and bits == 8 and float(x.float().abs().max()) > 0:
        assert nmse(y.float() / x.float().abs().max(), x.float() / x.float().abs().max()) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_turbo_zero_huge_and_tiny_vectors_in_one_call(dtype):
    x = torch.randn(6, 64).to(dtype)
    x[1] = 0
    x[3] *= 1000 if dtype == torch.float16 else 1e4
    x[4] /= 100
    codec = tqai.codec("turbo:bits=6")
    y = codec.decode(codec.encode(x), torch.float32)
    assert torch.equal(y[1], torch.zeros(64)), "a zero vector stays zero"
    for i in (0, 2, 3, 5):
        assert nmse(y[i], x[i]) < 2e-3, "and does not coarsen the others"


def test_turbo_ignores_strides_and_batches():
    x = torch.randn(3, 5, 64)
    codec = tqai.codec("turbo:bits=4")
    assert torch.equal(codec.decode(codec.encode(x.transpose(0, 1))), codec.decode(codec.encode(x.transpose(0, 1).contiguous())))
    big = torch.randn(9000, 64)  # more than one chunk
    assert nmse(codec.decode(codec.encode(big)), big) < 0.0094


def test_rotated_domain_gives_the_same_scores():
    codec = tqai.codec("turbo:bits=4")
    q, k = torch.randn(7, 64), torch.randn(11, 64)
    packed = codec.encode(k)
    plain = q @ codec.decode(packed).T
    assert torch.allclose(codec.rotate(q) @ codec.decode_rotated(packed).T, plain, atol=1e-3)


@pytest.mark.parametrize("name", names("codec"))
def test_every_codec_saves_and_loads(name):
    codec = build("codec", name)
    packed = codec.encode(torch.randn(5, 48))
    again = Packed.load(*packed.save())
    assert again.nbytes == packed.nbytes
    assert torch.equal(codec.decode(again), codec.decode(packed))


@pytest.mark.parametrize(
    "metadata, word",
    [
        (None, "tqai"),
        ({}, "tqai"),
        ({"tqai": "{"}, "damaged"),
        ({"tqai": "{}"}, "format"),
        ({"tqai": '{"format": 9, "codec": "turbo", "shape": [1], "meta": {}}'}, "upgrade"),
        ({"tqai": '{"format": 1, "codec": "turbo", "shape": [-1], "meta": {}}'}, "shape"),
        ({"tqai": '{"format": 1, "codec": 3, "shape": [1], "meta": {}}'}, "codec"),
    ],
)
def test_foreign_files_are_refused_by_field(metadata, word):
    with pytest.raises(ValueError, match=word):
        Packed.load({}, metadata)


@pytest.mark.parametrize(
    "x", [torch.tensor(1.0), torch.ones(3, dtype=torch.int64), torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf]])]
)
def test_turbo_refuses_what_it_cannot_code(x):
    with pytest.raises(ValueError, match="turbo"):
        tqai.codec("turbo").encode(x)


def test_decoding_with_another_width_is_refused():
    packed = tqai.codec("turbo:bits=4").encode(torch.randn(2, 8))
    with pytest.raises(ValueError, match="bits=3"):
        tqai.codec("turbo:bits=3").decode(packed)
