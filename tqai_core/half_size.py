"""The first steps at half the height and width: noise hides fine detail there, so the model need not look at it.

The sampler keeps its latent ``x`` of full size. Where a step is taken at half size, the model sees the lower half of the latent's
frequencies in each direction (orthonormal DCT-II), as a latent of its own with the noise level that it has there; its clean picture is
enlarged, and the finer half follows a Gaussian of the power that continues it. With an Euler sampler this is the progressive growth
of "Spectral Progressive Diffusion" (arXiv 2605.18736); since the sampler sees nothing of it, any sampler, mask or forecast goes with it.

When to stop is measured: the predicted clean picture's power, frequency by frequency, is continued as a power law into the finer half.
Where a part of it larger than the tolerance would be seen above the noise, the rest of the run has full size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

BANDS = 8  # of frequencies, in which the power is averaged
MOST = 8.0  # factor by which a predicted power may be too small
APART = 0.52  # difference of the pictures predicted at the two sizes, over their contrast, above which a model knows but one of them
FLAT = 0.05  # least contrast (variance within a picture) to compare with: a latent's is about 1, early predictions can be almost flat
JUDGED = 0.95  # from this sigma on pictures differ enough from the mean of all to judge by
TRUSTED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # models that were judged, and whether they know both sizes
START = 0.9  # a run that begins below this sigma begins with a picture, whose detail is there already


@lru_cache(maxsize=16)
def restriction(n: int, device: torch.device) -> Tensor:
    """``[n / 2, n]``: the lower half of the DCT's frequencies, as samples at every second place; its rows are orthonormal."""
    return _dct(n // 2, device).T @ _dct(n, device)[: n // 2]


@lru_cache(maxsize=32)
def _dct(n: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II as a matrix ``[n, n]``."""
    i = torch.arange(n, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def reduce(x: Tensor, sigma: float) -> tuple[Tensor, float]:
    """The latent of half size in ``x [..., h, w]`` at ``sigma``, and the sigma at which a model sees it.

    Enlarged by two, a picture has twice the amplitude in each DCT coefficient and noise has the same: so less noise is seen.
    """
    small = restriction(x.shape[-2], x.device) @ x.float() @ restriction(x.shape[-1], x.device).T
    return (small / (2 - sigma)).to(x.dtype), sigma / (2 - sigma)


def enlarge(x: Tensor, sigma: float, clean: Tensor, power: Tensor | None = None) -> Tensor:
    """The velocity of ``x [..., h, w]``, fp32: towards the ``clean [..., h / 2, w / 2]`` picture in its lower frequencies, and in the finer
    ones towards the mean of all Gaussian pictures of ``power [..., h, w]`` that fit ``x``; without one towards none.

    The finer half then has the variance that signal and noise have together, where noise alone would make the picture too smooth.
    """
    large = 2 * restriction(x.shape[-2], x.device).T @ clean.float() @ restriction(x.shape[-1], x.device)
    if power is not None:
        h, w = x.shape[-2:]
        rows, columns = _dct(h, x.device), _dct(w, x.device)
        coefficients = rows @ x.float() @ columns.T
        coefficients[..., : h // 2, : w // 2] = 0
        large = large + rows.T @ (coefficients * power * (1 - sigma) / (power * (1 - sigma) ** 2 + sigma**2)) @ columns
    return (x.float() - large) / sigma


class HalfSize:
    """Whether the steps of one generation are taken at half size.

    Args:
        tolerance: share of signal in what the finer half of the frequencies holds (the rest is noise) from which on steps have full
            size. 0: none has half size.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.model: ref[Any] | None = None  # whose steps these are
        self.begin()

    @property
    def trusted(self) -> bool | None:
        """Whether the model knows both sizes; None until one step of it was computed at both."""
        model = self.model and self.model()
        return None if model is None else TRUSTED.get(model)

    @trusted.setter
    def trusted(self, value: bool) -> None:
        if self.model is not None and (model := self.model()) is not None:
            TRUSTED[model] = value

    def begin(self) -> None:
        self.on: bool | None = None  # None before the first step
        self.share = 0.0
        self._judged_at: float | None = None
        self._powers: list[Tensor] = []
        self._sigma, self._size = 1.0, (0, 0)

    def enter(self, sigma: float) -> bool:
        """A step begins: whether it is the first one of full size after some of half size. One host sync, at half size only."""
        if self.on is None:
            self.on = self.tolerance > 0 and sigma >= START and self.trusted is not False
            return False
        if not self.on or not self._powers:
            return False
        powers = torch.stack(self._powers).mean(0).tolist()
        self._powers.clear()
        self.share = hidden(powers, self._size, self._sigma, sigma)
        self.on = self.share <= self.tolerance
        return not self.on

    def small(self, sigma: float) -> bool:
        """Whether calls at ``sigma`` are computed at half size. A model that was not judged yet waits for the step that judges it, which
        has full size in all branches."""
        return bool(self.on) and sigma != self._judged_at and (self.trusted is not None or sigma <= JUDGED)

    def judges(self, sigma: float) -> bool:
        """Whether the step at ``sigma`` is computed at both sizes: once for a model, early, where the prompt and the model's knowledge
        make the picture and not yet the latent."""
        return self.trusted is None and sigma <= JUDGED

    def judge(self, clean: Tensor, small: Tensor, sigma: float) -> str | None:
        """Why this model is not run at half size, from its pictures of both sizes for one latent, or None. A host sync, once."""
        full, half = reduce(clean, 0.0)[0].float(), small.float()
        contrast = full.var((-1, -2), correction=0).mean()
        apart = float(((half - full).square().mean() / (contrast + FLAT)).sqrt())
        self.trusted, self._judged_at = apart <= APART, sigma
        if self.trusted:
            return None
        self.off()
        return f"at half the size this model predicts another picture (relative difference {apart:.2f}): it was not trained for it"

    def off(self) -> None:
        self.on = False
        self._powers.clear()

    def velocity(self, x: Tensor, sigma: float, clean: Tensor, seen_at: float) -> Tensor:
        """The velocity of ``x [b, ..., h, w]`` at ``sigma``, fp32, from the picture of half size that the model
        predicted at ``seen_at``."""
        powers = _powers(clean.float())
        self._sigma, self._size = seen_at, (clean.shape[-2], clean.shape[-1])
        self._powers.append(powers.mean(0))
        return enlarge(x, sigma, clean, _continued(powers, x, seen_at))


@lru_cache(maxsize=16)
def _bands(h: int, w: int, device: torch.device) -> Tensor:
    """``[BANDS, h w]``: weights that average the coefficients of a band of frequencies; the mean is in none."""
    f = _frequencies(h, w)
    number = (f / f.max() * BANDS).long().clamp(max=BANDS - 1)
    rows = torch.stack([(number == i) & (f > 0) for i in range(BANDS)]).float().reshape(BANDS, -1)
    return (rows / rows.sum(-1, keepdim=True).clamp(min=1)).to(device)


@lru_cache(maxsize=8)
def _middles(device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[BANDS]``: log of the middle frequency of each band, in units of the highest."""
    return ((torch.arange(BANDS, device=device, dtype=dtype) + 0.5) / BANDS).log()


@lru_cache(maxsize=16)
def _finer(h: int, w: int) -> tuple[Tensor, Tensor]:
    """The frequencies that a picture of ``2 h`` x ``2 w`` has and its half has not, in units of the half's highest: log of the middle of
    each band, and the share of the coefficients in it."""
    f = _frequencies(2 * h, 2 * w) * 2 / _frequencies(h, w).max()
    f[:h, :w] = 0
    counts = (f[f > 0] * BANDS).long().bincount().double()
    return ((torch.arange(len(counts)).double() + 0.5) / BANDS).log()[counts > 0], (counts / counts.sum())[counts > 0]


@lru_cache(maxsize=16)
def _places(h: int, w: int, device: torch.device) -> Tensor:
    """``[h w]``: log of the frequency of each coefficient, in units of the highest that half the picture has; of the mean almost 0."""
    return (_frequencies(h, w) * 2 / _frequencies(h // 2, w // 2).max()).clamp(min=1e-6).log().flatten().to(device)


def _frequencies(h: int, w: int) -> Tensor:
    """Of the DCT's coefficients, 1 the highest in each direction."""
    return ((torch.arange(h) / h)[:, None] ** 2 + (torch.arange(w) / w) ** 2).sqrt()


def _powers(clean: Tensor) -> Tensor:
    """``[b, BANDS]``: mean power of the DCT coefficients of ``clean [b, ..., h, w]``, band by band."""
    h, w = clean.shape[-2:]
    coefficients = _dct(h, clean.device) @ clean @ _dct(w, clean.device).T
    return coefficients.reshape(len(clean), -1, h * w).square().mean(1) @ _bands(h, w, clean.device).T


def _power_at(places: Tensor, powers: Tensor, seen_at: float) -> Tensor:
    """Power ``[..., n]`` of a picture of full size at log frequencies ``places [n]``, from the ``powers [..., BANDS]`` of a clean picture
    of half size that was predicted at ``seen_at``.

    A prediction is a mean over all pictures that fit, which lacks what noise still hides. Of a Gaussian picture of power P a share
    P / (P + r) is seen, with r the noise's power over the signal's: solved for P, that undoes it, up to ``MOST`` times, since what is
    seen of almost nothing tells little. Then log P is a line over log f, through the bands that hold something; two of them at least.
    """
    ratio, f, held = (seen_at / max(1 - seen_at, 1e-3)) ** 2, _middles(powers.device, powers.dtype), powers > 0
    seen, weight = powers.where(held, 1.0), held.to(powers.dtype)
    log = (seen * ((1 + (1 + 4 * ratio / seen).sqrt()) / 2).clamp(max=MOST)).log()
    mean = lambda x: (weight * x).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)  # noqa: E731
    gap = f - mean(f)
    slope = (mean(gap * (log - mean(log))) / mean(gap.square()).clamp(min=1e-12)).clamp(max=0)
    power = 4 * (mean(log) + slope * (places - mean(f))).exp()  # four times: of a picture of twice the amplitude
    return power.where(weight.sum(-1, keepdim=True) >= 2, 0.0)


def _continued(powers: Tensor, x: Tensor, seen_at: float) -> Tensor:
    """The power of each coefficient of the pictures in ``x [b, ..., h, w]``: ``[b, 1 ..., h, w]``."""
    h, w = x.shape[-2:]
    return _power_at(_places(h, w, x.device), powers, seen_at).reshape(len(x), *(1,) * (x.ndim - 3), h, w)


def hidden(powers: list[float], size: tuple[int, int], seen_at: float, sigma: float) -> float:
    """Share of signal in the finer half of the frequencies at ``sigma``, from the ``powers`` of a clean picture of half ``size`` that
    was predicted at ``seen_at``."""
    places, part = _finer(*size)
    power = _power_at(places, torch.tensor(powers, dtype=torch.float64), seen_at)
    return float((part * power / (power + (sigma / max(1 - sigma, 1e-3)) ** 2)).sum())


def why_full(size: Sequence[int], patch: int, others: Iterable[str]) -> str | None:
    """Why a model's call on latents of ``size`` (height, width) has full size, or None. ``patch``: side of the model's patches.
    ``others``: arguments that tell of places in the picture."""
    if found := sorted(others):
        return f"the model is given {', '.join(found)}, which would have to be made smaller too"
    if any(length % (2 * max(patch, 2)) for length in size):
        return f"latents of {size[0]} x {size[1]} have no half that the model's patches fit into"
    return None
