"""The only definitions of every figure tqai prints."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

WINDOW = 7  # pixels, of SSIM


def nmse(x: Tensor, exact: Tensor) -> float:
    """|x - exact|^2 / |exact|^2 over the whole tensor."""
    exact = exact.float()
    return float((x.float() - exact).square().sum() / exact.square().sum().clamp_min(1e-38))


def psnr(x: Tensor, exact: Tensor) -> float:
    """10 log10(peak^2 / MSE) in dB with peak = max - min of ``exact``; inf when equal."""
    exact = exact.float()
    mse = float((x.float() - exact).square().mean())
    peak = float(exact.max() - exact.min())
    if mse == 0 or peak == 0:
        return math.inf if mse == 0 else -math.inf
    return 10 * math.log10(peak * peak / mse)


def ssim(x: Tensor, exact: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004; as scikit-image: uniform window of 7, sample covariance) of pictures
    ``[..., h, w]``, each channel and frame one picture; the range is max - min of ``exact``. nan where a side has under 7 pixels."""
    a, b = (t.reshape(-1, 1, *t.shape[-2:]) for t in (x, exact))
    if min(a.shape[-2:]) < WINDOW:
        return math.nan
    span = float(exact.max() - exact.min())
    return float(sum(_ssim(p.float(), q.float(), span) for p, q in zip(a, b, strict=True)) / len(a))  # one at a time: little memory


def _ssim(a: Tensor, b: Tensor, span: float) -> Tensor:
    mean = lambda t: avg_pool2d(t, WINDOW, 1)  # noqa: E731
    ma, mb = mean(a), mean(b)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    va, vb, both = ((mean(p * q) - m * n) * unbiased for p, q, m, n in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    return ((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def cosine(x: Tensor, exact: Tensor) -> float:
    """Mean cosine between vectors along the last dimension."""
    return float(torch.cosine_similarity(x.float(), exact.float(), dim=-1).mean())


def squares(guess: Tensor | None, x: Tensor) -> Tensor:
    """``[|guess - x|^2, |x|^2]`` as fp32 on the device, without a host sync; the first is 0 without a guess."""
    # scaled by the size, so that fp32 sums do not overflow where x itself does not
    scale = 1.0 / max(x.numel(), 1) ** 0.5
    size = (x.float() * scale).square().sum()
    error = size.new_zeros(()) if guess is None else ((guess - x.float()) * scale).square().sum()
    return torch.stack([error, size])


def relative(error: float, size: float) -> float:
    """Relative error from sums of squares; where the exact tensor is zero: 0 for a perfect forecast, else inf."""
    if size > 0:
        return math.sqrt(error / size)
    return 0.0 if error == 0 else math.inf
