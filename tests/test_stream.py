from __future__ import annotations

import pytest
import torch
from bench.stream import run, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

import tqai_core as tqai
from tqai_core.stream import PREDICTORS
from tqai_core.types import Packed


def drift(steps: int, shape=(2, 2, 20, 32), seed=0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, *shape, generator=g)
    return [a + b * t / steps + 0.2 * torch.sin(6 * c * t / steps) for t in range(steps)]


@given(
    predictor=st.sampled_from(PREDICTORS),
    bits=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    codec=st.sampled_from(["turbo", "trellis:short=0"]),
    key_every=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_decoder_and_encoder_walk_together(predictor, bits, codec, key_every, dtype):
    bits = (max(bits[0], 1), *bits[1:])
    coder = tqai.StreamCoder(predictor, codec=codec, bits=bits, key_every=key_every)
    steps = [x.to(dtype) for x in drift(6)]
    packed = [coder.encode(x, 1 - i / 6) for i, x in enumerate(steps)]
    decoded = coder.decode(packed)
    assert [y.dtype for y in decoded] == [dtype] * 6
    last = coder._past.values[0][1].to(dtype)
    assert torch.equal(decoded[-1], last), "the encoder predicts from what the decoder has, to the last bit"
    assert coder.bytes_sent == sum(p.nbytes for p in packed)
    again = [Packed.load(*p.save()) for p in packed]
    assert all(torch.equal(a, b) for a, b in zip(coder.decode(again), decoded, strict=True)), "a saved stream decodes alike"


def test_nothing_raw_is_held():
    """What stays alive decodes from the packed steps alone: wiping every input changes nothing."""
    steps = drift(5)
    coder = tqai.StreamCoder("ls", bits=(8, 3))
    packed = [coder.encode(x) for x in steps]
    want = coder.decode(packed)
    held = [v for _, v in coder._past.values]
    assert coder.nbytes == sum(v.numel() * 4 for v in held)
    for x in steps:
        x.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(coder.decode(packed), want, strict=True))
    assert all(bool(v.isfinite().all()) for v in held)


def test_errors_do_not_build_up():
    coder = tqai.StreamCoder("delta", codec="turbo:mean=never", bits=(6, 2))
    steps = drift(40)
    decoded = coder.decode([coder.encode(x) for x in steps])
    errors = [float((x - y).square().sum() / x.square().sum()) for x, y in zip(steps, decoded, strict=True)]
    assert max(errors[20:]) < 4 * max(errors[2:12])


def test_prediction_pays_and_the_fitted_one_most():
    nmse = {p: run(tqai.StreamCoder(p, codec="turbo:mean=never", bits=4), drift(12))["nmse"] for p in PREDICTORS}
    assert nmse["delta"] < nmse["none"] / 5
    assert nmse["delta2"] < nmse["delta"]
    assert nmse["ls"] < nmse["delta"]
    assert nmse["choice"] < 1.05 * min(nmse.values())


def test_the_synthetic_stream_meets_its_promises():
    twenty = run(tqai.StreamCoder("ls", codec="trellis:short=0", bits=(8, 4, 3, 3, 2)), synthetic(0))
    assert twenty["nmse"] <= 1.0e-4
    few = run(tqai.StreamCoder("ls", codec="trellis:short=0", bits=(5, 1, 1, 1, 0)), synthetic(0))
    assert few["nmse"] <= 3.75e-3
    assert few["bits"] <= 1.8


def test_constant_quality_spends_bits_where_the_stream_moves():
    steps = drift(6) + [drift(6)[-1]] * 3 + drift(1, seed=5)
    coder = tqai.StreamCoder("delta", codec="turbo:mean=never", nmse=1e-3)
    packed = [coder.encode(x) for x in steps]
    bits = [p.meta["bits"] for p in packed]
    assert bits[7] == bits[8] == 0, "a standing stream costs nothing"
    assert bits[9] > 4, "a cut is coded anew"
    for x, y in zip(steps, coder.decode(packed), strict=True):
        assert float((x - y).square().sum() / x.square().sum()) < 2e-3


def test_adaptive_basis_needs_no_side_information():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 48, 48, generator=g) * torch.linspace(2, 0.02, 48)[None, :, None]
    a, b = torch.randn(2, 2, 300, 48, generator=g)
    steps = [((a + 0.3 * t * b) @ mix) for t in range(5)]
    plain = run(tqai.StreamCoder("none", codec="trellis:short=0,mean=never", bits=4), steps)
    coder = tqai.StreamCoder("none", codec="trellis:short=0,mean=never", bits=4, basis="adaptive")
    ours = run(coder, steps)
    assert ours["nmse"] < plain["nmse"] / 1.8
    assert ours["sent"] == plain["sent"]


def test_bad_input():
    for make, word in (
        (lambda: tqai.StreamCoder("cubic"), "cubic"),
        (lambda: tqai.StreamCoder(bits=(0, 4)), "first at least 1"),
        (lambda: tqai.StreamCoder(bits=(9,)), "0 to 8"),
        (lambda: tqai.StreamCoder(codec="exact"), "exact"),
        (lambda: tqai.StreamCoder(basis="pca"), "pca"),
        (lambda: tqai.StreamCoder("ls", basis="adaptive"), "adaptive"),
        (lambda: tqai.StreamCoder(nmse=2), "nmse"),
        (lambda: tqai.StreamCoder(key_every=-1), "key_every"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
    coder = tqai.StreamCoder("delta", codec="turbo")
    first, second = (coder.encode(x) for x in drift(2))
    with pytest.raises(ValueError, match="reset"):
        coder.encode(torch.randn(3, 32))
    with pytest.raises(ValueError, match="key step"):
        coder.decode([second])
    coder.reset()
    assert coder.nbytes == coder.bytes_sent == 0
    assert len(coder.decode([first])) == 1
