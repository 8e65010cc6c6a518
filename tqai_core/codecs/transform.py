"""Groups of neighbouring frames of keys or values, coded as a video codec codes pictures: by a transform, with bits where the energy is.

A group is ``T`` frames. Each token becomes ``T x D`` coefficients with those at its place in the other frames: a cosine transform over
time, and over the channels the axes that the first frames of the stream had (:func:`codecs.split.axes`). A coefficient gets 0 to 8 bits,
by its energy: reverse water-filling (Cover and Thomas, ch. 10). Where a quarter of the axes holds nearly all of the energy, and
neighbouring frames are alike, two bits a number in the mean are six and more where it counts; of numbers without such structure it is a
plain quantiser. Lloyd-Max levels (:mod:`codecs.scalar`), a logarithmic gain of 8 bits for each place and each of the ``T`` frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..types import nbytes
from ..workspace import Workspace
from . import gain
from .scalar import run_bytes, scalar
from .split import axes, reflect

ERROR = (1.0, 0.3634, 0.1175, 0.03454, 0.009501, 0.002505, 0.00066, 0.00017, 0.0000446)  # of 0 to 8 bits, Gaussian
SHARE = 0.125  # of the bytes of the codes that axes may take
FLOOR = 1e-7  # of the mean energy: what a channel that is always zero counts
LEAST = 1e-4  # weight of a channel, of the largest: a channel that no query looks at must not be lost


@dataclass
class Group:
    """``T`` frames: codes ``uint8 [H, P, bytes]``, gains ``uint8 [H, P, T]`` and their span ``fp32 [2]``."""

    codes: Tensor
    gains: Tensor
    span: Tensor


@dataclass(frozen=True)
class Transform:
    """The coder of one layer and sequence, for groups ``fp32 [H, P, T, D]``: heads, places of a frame, frames, channels."""

    mean: Tensor  # bf16 [H, 1, 1, D]
    weight: Tensor | None  # bf16 [H, 1, 1, D]: what an error in a channel counts; None: the same in all
    basis: Tensor  # int8 [H, r, D]
    deviation: tuple[Tensor, Tensor]  # of the coefficients, as gains: codes [H, T, D], span
    bits: Tensor  # uint8 [T, D], on the CPU: of the coefficients
    expected: Tensor  # fp32 []: squared error of the coefficients, of their energy

    @staticmethod
    def fit(x: Tensor, bits: float, tokens: int, weight: Tensor | None = None) -> Transform:
        """For groups like ``x fp32 [H, P, T, D]``: ``bits`` a number, gains included; axes come on top of it, with at most an eighth of
        the bytes of ``tokens``, which are held at a time. ``weight [H, 1, 1, D]``: what an error in a channel counts."""
        t, d = x.shape[2:]
        mean = x.mean((1, 2), keepdim=True).bfloat16()
        weight = None if weight is None else (weight / weight.amax(-1, keepdim=True)).clamp_min(LEAST).bfloat16()
        x = _weighted(x - mean.float(), weight)
        flat = x.flatten(1, 2)
        reflections = min(int(SHARE * bits * tokens / 8), d - 1)
        basis = axes(flat.mT @ flat, reflections)
        y = _forward(x, basis)
        energy = y.square().mean(1)
        energy = energy + FLOOR * energy.mean() + 1e-30
        chosen = _within(energy.mean(0), int(bits * t * d) - 8 * t)
        used = int(chosen.any(0).nonzero().amax()) + 1 if bool(chosen.any()) else 0
        if used < reflections:
            basis = basis[:, :used].clone()
        codes, span = gain.encode(energy.sqrt().flatten())
        left = torch.tensor(ERROR, device=x.device)[chosen.to(x.device).long()]
        return Transform(mean, weight, basis, (codes.view_as(energy), span), chosen, (energy * left).sum() / energy.sum())

    @property
    def nbytes(self) -> int:
        return nbytes(list(vars(self).values()))

    def stored(self, x: Tensor) -> Tensor:
        """What is coded of ``x``: centred, and weighted."""
        return _weighted(x - self.mean.float(), self.weight)

    def encode(self, x: Tensor) -> Group:
        """``x fp32 [H, P, T, D]``; NaN and inf show in the span of the gains."""
        h, p, t, _ = x.shape
        y, deviation = _forward(self.stored(x), self.basis), self._deviation()
        kept = (self.bits > 0).to(y.device)
        power = (y.square() * kept).sum(-1) / (deviation.square() * kept).sum(-1).clamp_min(1e-30)[:, None]
        gains, span = gain.encode(power.sqrt().flatten())
        scale = gain.decode(gains, span).view(h, p, t, 1)
        y = (y / (scale * deviation[:, None]).clamp_min(1e-30)).view(h * p, -1)
        order, counts = self._order(y.device)
        ones, work = y.new_ones(h * p, 1), Workspace(y.device)
        runs = zip(counts, y[:, order].split([n for _, n in counts], 1), strict=True)
        parts = [scalar(b, None, y.device).encode(own.contiguous(), ones, None, work)[0].clone() for (b, _), own in runs]
        codes = torch.cat(parts, 1) if parts else gains.new_empty(h * p, 0)
        return Group(codes.view(h, p, -1), gains.view(h, p, t), span)

    def decode(self, *groups: Group) -> Tensor:
        """``fp32 [H, groups x P, T, D]``: what :meth:`encode` was given, with its error."""
        codes = torch.cat([group.codes for group in groups], 1)
        scale = torch.cat([gain.decode(group.gains.flatten(), group.span).view_as(group.gains) for group in groups], 1)[..., None]
        (h, n, _), (t, d), used, device = codes.shape, self.bits.shape, self.used, codes.device
        order, counts = self._order(device)
        parts, work, at = codes.view(h * n, -1).split([run_bytes(count, b) for b, count in counts], 1), Workspace(device), 0
        levels = torch.zeros(h * n, len(order) + 1, device=device)  # the last column is that of coefficients without bits
        for (b, count), part in zip(counts, parts, strict=True):
            levels[:, at : at + count] = scalar(b, None, device).decode(part, count, work)
            at += count
        place = torch.full((t * d,), len(order), device=device).index_copy_(0, order, torch.arange(len(order), device=device))
        y = levels.index_select(1, place.view(t, d)[:, :used].flatten()).view(h, n, t, used) * (
            scale * self._deviation()[:, None, :, :used]
        )
        y = y.permute(2, 0, 1, 3).reshape(t, -1)  # time first: one wide product
        turned = (cosine(t).mT.to(device) @ y).view(t, h, n, used).transpose(0, 1).reshape(h, t * n, used)
        channels = torch.eye(used, d, device=device).expand(h, -1, -1)
        channels = reflect(channels[None], self.basis, back=True)[0] if self.basis.shape[1] else channels
        channels = channels if self.weight is None else channels / self.weight[:, 0].float()
        return torch.baddbmm(self.mean[:, 0].float(), turned, channels).view(h, t, n, d).transpose(1, 2)

    @property
    def used(self) -> int:
        """The first axes, up to the last one that has bits."""
        some = self.bits.any(0).nonzero()
        return int(some.amax()) + 1 if len(some) else 0

    def _deviation(self) -> Tensor:
        codes, span = self.deviation
        return gain.decode(codes.flatten(), span).view(codes.shape)

    def _order(self, device: torch.device) -> tuple[Tensor, list[tuple[int, int]]]:
        """The coefficients that have bits, those of most bits first, and how many have how many."""
        flat, order = self.bits.flatten().sort(descending=True, stable=True)
        counts = flat.long().bincount(minlength=9).tolist()
        return order[: len(order) - counts[0]].to(device), [(b, counts[b]) for b in range(8, 0, -1) if counts[b]]


def _within(energy: Tensor, total: int) -> Tensor:
    """The same, so that what is coded with as many bits, rounded up to whole bytes, is within ``total``."""
    spent = total
    while True:
        bits = allocate(energy, spent)
        counts = bits.flatten().long().bincount(minlength=9).tolist()
        extra = 8 * sum(run_bytes(counts[b], b) for b in range(1, 9)) - total
        if extra <= 0 or spent <= 0:
            return bits
        spent -= extra


def allocate(energy: Tensor, total: int) -> Tensor:
    """Bits ``uint8``, on the CPU, of coefficients of ``energy``, ``total`` together: each goes where it takes away most error."""
    error = torch.tensor(ERROR, device=energy.device)
    gains = energy[..., None] * (error[:-1] - error[1:])  # falling from bit to bit, so the largest are the first bits
    taken = gains.flatten().topk(min(max(total, 0), gains.numel())).indices
    return (
        torch.zeros(gains.numel(), dtype=torch.uint8, device=energy.device)
        .index_fill_(0, taken, 1)
        .view_as(gains)
        .sum(-1)
        .to("cpu", torch.uint8)
    )


@lru_cache(maxsize=8)
def cosine(t: int) -> Tensor:
    """The orthonormal cosine transform ``fp32 [t, t]`` (type II); its rows are frequencies."""
    angle = math.pi / t * torch.outer(torch.arange(t), torch.arange(t) + 0.5)
    matrix = angle.cos() * (2 / t) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight.float()


def _forward(x: Tensor, basis: Tensor) -> Tensor:
    turned = cosine(x.shape[2]).to(x.device) @ x
    return reflect(turned.flatten(1, 2)[None], basis)[0].view_as(x) if basis.shape[1] else turned
