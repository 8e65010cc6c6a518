"""Inputs of blocks, packed: what ComfyUI keeps of a pose video."""

from __future__ import annotations

import pytest
import torch

from tqai_core.kv.activations import LEAST, Activations
from tqai_core.metrics import nmse


def tokens(n: int = 1024, channels: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_error_is_that_of_the_bits(bits, lloyd_max):
    """Within a tenth of the best scalar quantiser (8 bits: uniform levels), and the bytes are counted on the tensors."""
    x = tokens()
    packed = Activations.pack(x, bits)
    assert packed.why == ""
    found = nmse(packed.dense(), x)
    assert found <= (1.1 if bits < 8 else 3.0) * lloyd_max[bits]
    assert float(packed.error) == pytest.approx(found, rel=1e-3)
    assert packed.numbers == x.numel()
    assert packed.tokens == 1024
    own = packed.codes.numel() + 2 * packed.gain.numel() + 2 * 2 * 256 + 4
    assert packed.nbytes == own
    assert 8 * packed.nbytes / packed.numbers <= bits + 16 / 128 + 32 / 1024 + 0.01


@pytest.mark.parametrize(("channels", "row"), [(5120, 128), (192, 64), (96, 32), (80, 16)])
def test_rows_fit_the_channels(channels, row):
    packed = Activations.pack(tokens(300, channels), 4)
    assert packed.coder.d == row
    assert nmse(packed.dense(), tokens(300, channels)) < 0.0125


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_large_channels_and_means_do_no_harm_to_the_others(bits):
    """A hundred times the size in some channels, far means in others: the error of each channel, measured in its own size, stays."""
    x = tokens(600)
    size, mean = torch.ones(256), torch.zeros(256)
    size[[3, 70, 200]], mean[[5, 70]] = 125.0, 300.0
    plain = Activations.pack(x, bits).dense() - x
    large = (Activations.pack(x * size + mean, bits).dense() - x * size - mean) / size
    worst = lambda wrong: wrong.square().mean((0, 1)).amax()
    assert large.square().mean() <= 1.05 * plain.square().mean()
    assert worst(large) <= 1.3 * worst(plain)


def test_correlated_channels_take_axes_of_their_own():
    """From 2,048 tokens on, where a few directions hold the energy: less error at no more bytes."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=g))[0][:24]
    x = torch.randn(1, 4096, 24, generator=g) @ basis + 0.05 * torch.randn(1, 4096, 128, generator=g)
    many, few = Activations.pack(x, 4), Activations.pack(x[:, :2000], 4)
    assert many.coder.basis is not None
    assert few.coder.basis is None
    assert nmse(many.dense(), x) < 0.5 * nmse(few.dense(), x[:, :2000])
    assert many.nbytes / many.numbers <= few.nbytes / few.numbers


def test_what_cannot_be_packed_is_kept_as_it_is():
    few, odd, wrong = tokens(LEAST - 1), tokens(300, 100), tokens()
    wrong[0, 7, 7] = float("inf")
    for x, why in ((few, f"fewer than {LEAST} tokens"), (odd, "100 channels"), (wrong, "NaN or inf")):
        packed = Activations.pack(x, 4)
        assert why in packed.why
        assert torch.equal(packed.dense(), x)
        assert packed.dense().data_ptr() != x.data_ptr(), "the model goes on writing there"
        assert packed.nbytes == 4 * x.numel()
        assert (packed.numbers, packed.error) == (x.numel(), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_comes_back_and_host_rows_are_the_same(dtype):
    x = tokens(600).to(dtype)
    packed = Activations.pack(x, 5)
    assert packed.dense().dtype == dtype
    assert torch.equal(Activations.pack(x, 5, host=True).dense(), packed.dense())
    assert torch.equal(packed.offload().dense(), packed.dense())
    assert nmse(packed.dense().float(), x.float()) < 0.003
