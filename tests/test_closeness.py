"""How close a run is to the exact one: figures by hand, the picture of the difference, things that cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tqai_core.closeness import HEAD, Closeness, Comparison, difference
from tqai_core.metrics import psnr, ssim


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_windows(x, y, span):
    """SSIM of one picture, window by window in float64."""
    found = []
    for i in range(x.shape[0] - 6):
        for j in range(x.shape[1] - 6):
            a, b = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
            c = np.cov(a, b)
            c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
            top = (2 * a.mean() * b.mean() + c1) * (2 * c[0, 1] + c2)
            found.append(top / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (c[0, 0] + c[1, 1] + c2)))
    return np.mean(found)


def test_ssim_is_that_of_the_definition():
    exact = torch.rand(2, 3, 12, 9, generator=torch.Generator().manual_seed(1))
    x = exact + 0.1 * noise(2, 3, 12, 9)
    span = float(exact.max() - exact.min())
    pairs = zip(x.double().flatten(0, 1).numpy(), exact.double().flatten(0, 1).numpy(), strict=True)
    assert ssim(x, exact) == pytest.approx(np.mean([by_windows(a, b, span) for a, b in pairs]), abs=1e-5)
    assert ssim(exact, exact) == pytest.approx(1.0, abs=1e-6)
    assert ssim(x, exact) == pytest.approx(ssim(x[:, :, None], exact[:, :, None])), "frames are pictures too"
    assert math.isnan(ssim(x[..., :6], exact[..., :6]))


def test_figures_by_hand():
    exact = torch.linspace(-1, 3, 64).reshape(1, 1, 8, 8)
    x = exact.clone()
    x[0, 0, 3, 4] += 0.4
    close = Closeness.of(x, exact)
    assert close.largest == pytest.approx(0.1)
    assert close.psnr == pytest.approx(10 * math.log10(16 / (0.16 / 64)), abs=1e-3)
    assert close.cells() == ["38.1 dB", f"{close.ssim:.4f}", "10.00% of the range"]
    assert not close.identical
    same = Closeness.of(exact, exact)
    assert same.identical
    assert same.cells() == ["identical", "1", "0.00% of the range"]
    assert (same.psnr, same.largest) == (math.inf, 0)


def test_an_exact_run_of_one_value_has_no_range():
    flat = torch.ones(1, 1, 8, 8)
    assert Closeness.of(flat, flat).identical
    assert psnr(flat + 1, flat) == -math.inf
    assert Closeness.of(flat + 1, flat).largest == math.inf


def test_a_broken_run_is_not_close():
    exact = noise(1, 4, 8, 8)
    broken = Closeness.of(exact * math.nan, exact)
    assert not broken.identical
    assert all(map(math.isnan, (broken.psnr, broken.ssim, broken.largest)))
    assert broken.cells()[0] == "nan dB"


@pytest.mark.parametrize("frames", [(), (5,)])
def test_the_difference_is_that_of_the_worst_picture(frames):
    exact = noise(2, 3, *frames, 8, 10)
    x = exact + 0.01
    x[1, :, ..., 2, 7] += 0.5
    picture = difference(x, exact)
    assert picture.shape == (8, 10)
    assert picture[2, 7] == 1
    assert picture.sum() == pytest.approx(1 + 79 * 0.01 / 0.51, abs=1e-3)
    assert difference(exact, exact).sum() == 0


def test_a_comparison_of_video_with_sound():
    video, sound = noise(1, 4, 3, 8, 8), noise(1, 6, 20)
    both = Comparison.of([("latent", video + 0.1, video), ("latent 2", sound, sound)])
    assert both.difference.shape == (8, 8), "the picture of the video"
    assert [row[0] for row in both.table()] == ["latent", "latent 2"]
    assert both.to_markdown().splitlines()[0] == f"| {' | '.join(HEAD)} |"
    assert both.short("latent 2") == "identical to exact"
    assert both.short("latent") == f"{psnr(video + 0.1, video):.1f} dB to exact"


def test_other_shapes_are_told_and_not_compared():
    other = Comparison.of([("picture", noise(1, 3, 8, 8), noise(1, 3, 16, 16))])
    assert other.rows == {}
    assert "[1, 3, 8, 8] here, [1, 3, 16, 16] in the exact run" in other.to_markdown()
    assert other.difference.max() == 0
