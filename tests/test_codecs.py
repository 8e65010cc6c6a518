from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import tqai_core as tqai
from tqai_core.codecs import levels, packing, rotation
from tqai_core.codecs.bases import hadamard
from tqai_core.codecs.scalar import scalar
from tqai_core.metrics import nmse
from tqai_core.registry import build, names
from tqai_core.types import Packed
from tqai_core.workspace import Workspace

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
    assert torch.equal(table.decode(packed, d, Workspace(packed.device)), levels.lloyd_max(bits)[codes]), "unpacks and dequantises at once"


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
    turned = hadamard(d, 4, 3).heads[0].forward(x)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(turned.view(-1, len(m)) @ m, x.view(-1, len(m)), atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_turbo_error_and_bytes(bits, lloyd_max):
    """A rotated vector's numbers are nearly Gaussian: the levels lose no more than the best ones for Gaussian numbers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 128, generator=g) * torch.exp(0.5 * torch.randn(4096, 1, generator=g))
    codec = tqai.codec(f"turbo:bits={bits},mean=never")
    packed = codec.encode(x)
    y = codec.decode(packed)
    assert float(((x - y).square().sum(-1) / x.square().sum(-1)).mean()) <= lloyd_max[bits]
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
def test_turbo_zero_huge_and_tiny_vectors_in_one_call(dtype, lloyd_max):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[3] *= 1000 if dtype == torch.float16 else 1e4
    x[4] /= 100
    codec = tqai.codec("turbo:bits=6")
    y = codec.decode(codec.encode(x), torch.float32)
    assert torch.equal(y[1], torch.zeros(64)), "a zero vector stays zero"
    for i in (0, 2, 3, 5):
        assert nmse(y[i], x[i]) < lloyd_max[5], "and does not coarsen the others by a bit"


def test_turbo_ignores_strides_and_batches(lloyd_max):
    x = torch.randn(3, 5, 64)
    codec = tqai.codec("turbo:bits=4")
    assert torch.equal(codec.decode(codec.encode(x.transpose(0, 1))), codec.decode(codec.encode(x.transpose(0, 1).contiguous())))
    big = torch.randn(9000, 64)  # more than one chunk
    assert nmse(codec.decode(codec.encode(big)), big) < lloyd_max[4]


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


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_trellis_error_and_bytes(bits, lloyd_max):
    """Four states gain 0.99 dB over scalar levels at high rates (Marcellin and Fischer 1990); half of it at 1 bit."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4096, 128, generator=g) * torch.exp(0.5 * torch.randn(4096, 1, generator=g))
    codec, fast = tqai.codec(f"trellis:bits={bits},mean=never"), tqai.codec(f"turbo:bits={bits},mean=never")
    packed = codec.encode(x)
    error = float(((x - codec.decode(packed)).square().sum(-1) / x.square().sum(-1)).mean())
    assert error <= lloyd_max[bits] * 10 ** -(0.099 if bits > 1 else 0.0495)
    assert packed.nbytes == fast.encode(x).nbytes, "the same container, byte for byte"
    assert error < nmse(fast.decode(fast.encode(x)), x) * 0.9


def exhaustive(y: torch.Tensor, level: torch.Tensor) -> float:
    """Least squared error over all code sequences of a short vector, straight from the definition."""
    import itertools

    best = math.inf
    for u in itertools.product((0, 1), repeat=len(y)):
        error, a, b = 0.0, 0, 0  # u_{t-1}, u_{t-2}
        for value, now in zip(y.tolist(), u, strict=True):
            error += float((level[2 * (now ^ b) + a :: 4] - value).square().min())
            a, b = now, a
        best = min(best, error)
    return best


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_search_finds_the_best_path(bits):
    from tqai_core.codecs.viterbi import trellis4, trellis_levels

    tables = trellis4(bits, torch.device("cpu"))
    y = torch.randn(6, 8, generator=torch.Generator().manual_seed(bits))
    packed, _, _ = tables.encode(y.clone(), torch.ones(6, 1), None, Workspace(y.device))
    q = tables.decode(packed, 8, Workspace(y.device))
    for row, chosen in zip(y, q, strict=True):
        assert float((row - chosen).square().sum()) == pytest.approx(exhaustive(row, trellis_levels(bits)), rel=0.02, abs=1e-3)


@given(bits=st.integers(1, 8), d=st.integers(1, 67), n=st.integers(0, 9), short=st.sampled_from([0, 1024]), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_trellis_takes_any_shape(lloyd_max, bits, d, n, short, dtype):
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    codec = tqai.codec(f"trellis:bits={bits},short={short}")
    packed = codec.encode(x)
    y = codec.decode(packed)
    assert y.shape == x.shape
    assert y.dtype == dtype
    if x.numel() >= 256:  # enough numbers for a mean to say something; short vectors are no Gaussian ones, and their gain is a byte
        assert nmse(y, x) < 1.5 * lloyd_max[bits] + 1e-3 + (1e-4 if dtype != torch.float32 else 0)


def test_a_short_call_takes_scalar_levels_by_itself():
    codec = tqai.codec("trellis:bits=4")
    assert codec.encode(torch.randn(1023, 64)).meta["kind"] == "lm"
    assert codec.encode(torch.randn(1024, 64)).meta["kind"] == "tcq"


@pytest.mark.parametrize("name", ["turbo", "trellis"])
def test_the_mean_of_a_head_is_taken_off_and_paid_for(name):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 400, 64, generator=g) + 20 * torch.randn(2, 3, 1, 64, generator=g)
    with_mean, without = tqai.codec(f"{name}:bits=4"), tqai.codec(f"{name}:bits=4,mean=never")
    a, b = with_mean.encode(x), without.encode(x)
    assert a.nbytes - b.nbytes == 6 * 64 * 2
    assert nmse(with_mean.decode(a), x) < nmse(without.decode(b), x) / 50
    assert "mean" not in with_mean.encode(x[:, :, :255]).tensors
    q = torch.randn(2, 3, 5, 64, generator=g)
    rotated = with_mean.rotate(q) @ with_mean.decode_rotated(a).transpose(-1, -2)
    plain = q @ with_mean.decode(a).transpose(-1, -2)
    offset = q @ a.tensors["mean"].view(2, 3, 64, 1).float()
    assert torch.allclose(rotated + offset, plain, atol=2e-2, rtol=1e-3), "scores differ by one number a query"


def correlated(heads: int, n: int, d: int, seed: int) -> torch.Tensor:
    g, h = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, d, d, generator=g) * torch.logspace(0.5, -2, d)[None, :, None]
    return torch.randn(heads, n, d, generator=h) @ mix


def test_calibrated_bases_win_on_held_out_data_at_the_same_bytes(tmp_path):
    from bench import bases

    file, verdicts = bases.calibrate({"0/k": correlated(3, 2000, 64, 1)}, 4)
    assert [v["kept"] for v in verdicts["0/k"]] == ["klt"] * 3
    file.save(tmp_path / "b.safetensors")
    x = correlated(3, 1500, 64, 2)
    codec, plain = tqai.codec({"name": "trellis", "basis": str(tmp_path / "b.safetensors")}), tqai.codec("trellis")
    packed = codec.encode(x, stream="0/k")
    assert packed.nbytes == plain.encode(x).nbytes
    assert nmse(codec.decode(packed), x) < nmse(plain.decode(plain.encode(x)), x) / 5
    q = correlated(3, 4, 64, 3)
    offset = q @ packed.tensors["mean"].view(3, 64, 1).float()
    scores = codec.rotate(q, packed) @ codec.decode_rotated(packed).transpose(-1, -2) + offset
    assert torch.allclose(scores, q @ codec.decode(packed).transpose(-1, -2), rtol=1e-3, atol=1e-2)
    again = Packed.load(*packed.save())
    assert torch.equal(tqai.codec(again.codec).decode(again), codec.decode(packed))
    for make, word in (
        (lambda: codec.encode(x), "stream"),
        (lambda: codec.encode(x, stream="9/k"), "9/k"),
        (lambda: codec.encode(x[:2], stream="0/k"), "3 heads"),
        (lambda: codec.encode(x[..., :32], stream="0/k"), "another size"),
        (lambda: tqai.codec({"name": "trellis", "bits": 3, "basis": str(tmp_path / "b.safetensors")}).encode(x, stream="0/k"), "4 bits"),
        (lambda: tqai.codec("trellis:basis=/nowhere.safetensors").encode(x, stream="0/k"), "nowhere"),
    ):
        with pytest.raises(ValueError, match=word):
            make()


def test_calibration_falls_back_where_it_does_not_win():
    from bench import bases

    flat = torch.randn(2, 3000, 64, generator=torch.Generator().manual_seed(0))
    few = correlated(1, 100, 64, 1)
    file, verdicts = bases.calibrate({"flat": flat, "few": few}, 4)
    assert [v["kept"] for v in verdicts["flat"] + verdicts["few"]] == ["hadamard"] * 3
    assert "fewer than 2 d" in verdicts["few"][0]["why"]
    x = torch.randn(2, 1100, 64)
    plain = tqai.codec("trellis")
    made = file.of("flat", 64, 2, 4, 0)
    assert torch.equal(plain.decode(plain.encode(x, bases=made), bases=made), plain.decode(plain.encode(x)))


@pytest.mark.parametrize("total", [0, 64, 200, 256, 512])
def test_water_filling_spends_every_bit_on_the_largest_variance(total):
    from tqai_core.codecs.bases import water_fill

    runs = water_fill(torch.logspace(2, -2, 64), total)
    assert sum((b - a) * bits for a, b, bits in runs) == total
    widths = [bits for _, _, bits in runs]
    assert widths == sorted(widths, reverse=True)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_mutated_files_are_refused_or_decode_to_the_right_shape(data):
    """A flipped, cut or grown byte never crashes the loader in a way a user cannot read."""
    from safetensors.torch import load, save

    codec = tqai.codec("turbo:bits=3")
    tensors, metadata = codec.encode(torch.randn(6, 20, generator=torch.Generator().manual_seed(0))).save()
    blob = bytearray(save(tensors, metadata))
    how = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    at = data.draw(st.integers(0, len(blob) - 1))
    if how == "flip":
        blob[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        blob = blob[:at]
    else:
        blob[at:at] = b"\x00" * data.draw(st.integers(1, 9))
    try:
        packed = Packed.from_bytes(bytes(blob))
        y = tqai.codec(packed.codec).decode(packed)
    except ValueError:
        return
    assert load(bytes(blob)).keys() == tensors.keys()
    assert y.shape == packed.shape


def test_turbo_compiles_without_graph_breaks():
    codec = tqai.codec("turbo:bits=4")
    x = torch.randn(300, 64)
    packed = codec.encode(x)
    graphs = []

    def count(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    encode = torch.compile(lambda x: codec.encode(x).tensors, backend=count, fullgraph=True)
    tensors = encode(x)
    assert torch.equal(tensors["codes"], packed.tensors["codes"])
    decode = torch.compile(
        lambda tensors: codec.decode(Packed(packed.codec, packed.shape, tensors, packed.meta)), backend=count, fullgraph=True
    )
    assert torch.allclose(decode(tensors), codec.decode(packed), atol=1e-5)
    assert len(graphs) == 2


@pytest.mark.parametrize("d", [128, 256, 512, 1024])
def test_the_fast_hadamard_is_the_dense_one(d, lloyd_max):
    basis = hadamard(d, 4, 5).heads[0]
    x = torch.randn(7, d)
    fast = rotation.hadamard(x * basis.signs, basis.small, torch.empty(7, d))
    assert torch.allclose(fast, x @ basis.matrix.T, atol=1e-4)
    turned = rotation.hadamard_columns(x, basis.signed, torch.empty(d, 7), torch.empty(d, 7))
    assert torch.allclose(turned.T, fast, atol=1e-4)
    g = torch.Generator().manual_seed(d)  # by chance alone the mean would be too small for the bound
    big = torch.randn(1500, d, generator=g) + 3 * torch.randn(d, generator=g)
    for name in ("turbo", "trellis"):
        codec = tqai.codec(f"{name}:bits=6")
        packed = codec.encode(big)
        assert nmse(codec.decode(packed), big) < 1.25 * lloyd_max[6] / 10, "the mean is nine tenths of it"
        big[3] = 0  # takes the way with a scale
        assert nmse(codec.decode(codec.encode(big)), big) < 1.25 * lloyd_max[6] / 10


def test_runs_of_every_width_share_memory_without_mixing():
    from tqai_core.codecs.bases import Bases, Basis

    runs = tuple((8 * i, 8 * i + 8, 8 - i) for i in range(9))
    made = Bases((Basis(torch.eye(72), runs, torch.ones(72)),))
    x = torch.randn(2000, 72, generator=torch.Generator().manual_seed(0))
    for name in ("turbo", "trellis"):
        codec = tqai.codec(f"{name}:mean=never")
        y = codec.decode(codec.encode(x, bases=made), bases=made)
        errors = [nmse(y[:, a:b], x[:, a:b]) for a, b, _ in runs]
        assert all(left < right for left, right in pairwise(errors)), "fewer bits, more error"
        assert errors[0] < 2e-3
        assert errors[-1] == 1
