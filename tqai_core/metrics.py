"""The only definitions of every figure tqai prints."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nmse(x: Tensor, exact: Tensor) -> float:
    """|x - exact|^2 / |exact|^2 over the whole tensor."""
    exact = exact.float()
    return float((x.float() - exact).square().sum() / exact.square().sum().clamp_min(1e-38))


def psnr(x: Tensor, exact: Tensor) -> float:
    """10 log10(peak^2 / MSE) in dB with peak = max - min of ``exact``; inf when equal."""
    exact = exact.float()
    mse = float((x.float() - exact).square().mean())
    peak = float(exact.max() - exact.min())
    return math.inf if mse == 0 else 10 * math.log10(peak * peak / mse)


def ssim(x: Tensor, exact: Tensor) -> float:
    """Mean structural similarity (scikit-image, window 7) of single-channel pictures ``[n, 1, (frames,) h, w]``; the range
    is max - min of ``exact``. ImportError without scikit-image."""
    from skimage.metrics import structural_similarity

    a, b = (t.float().flatten(0, -3).cpu().numpy() for t in (x, exact))
    span = float(b.max() - b.min())
    return float(sum(structural_similarity(p, q, data_range=span) for p, q in zip(a, b, strict=True)) / len(a))


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
