"""Rows whose error is shaped: before the rotation each head has a matrix of its own, from a file of ``tqai calibrate``.

A row ``x`` is coded as ``A x`` and read as the inverse of it. A query meets coded keys as ``A^-T q``; the sum of coded values comes back
by ``A^-1``, once. So reading costs nothing, and the bytes of a row stay as they are. With second moments ``C`` of the rows and ``G`` of the
queries that meet them, ``A`` takes half of the unevenness of ``C`` away, in decibels: all of it would put more error where rows are small
than a few bits can bear.

What ``G`` has of unevenness is left to the choice of the codes: the error ``e`` of a row costs ``e'Me`` with ``M = A^-T G A^-1``, so
coordinates are coded a few at a time, and the next ones make good what the error of those before does to the scores (noise feedback by the
block Cholesky factor of ``M``, as GPTQ 2210.17323 rounds weights). At a high rate the cost is the geometric mean of ``M``, not the
arithmetic one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Rows

STEP = 8  # coordinates that are coded together: of one at a time the cost is a twelfth lower, and coding takes five times as long


class Shaped(Rows):
    """A coder of rows ``[B, H, ..., d]`` with the tables of ``plain``. ``shape fp32 [H, d, d]`` has the matrices ``A``, ``metric`` of the
    same size the ``M``; None: all errors cost alike."""

    def __init__(self, plain: Rows, shape: Tensor, metric: Tensor | None = None) -> None:
        vars(self).update(vars(plain))
        self.runs = (self,)
        self.forward = (shape.mT @ plain.forward).contiguous()
        self.back = torch.linalg.inv(self.forward).contiguous()
        self.asking = self.back.mT.contiguous()
        self.metric = None if metric is None else plain.forward.mT @ metric @ plain.forward
        self._feedback = None if self.metric is None else feedback(self.metric)

    def choose(self, z: Tensor) -> Tensor:
        if self._feedback is None:
            return super().choose(z)
        z = z.flatten(2, -2)
        error, codes = torch.empty_like(z), torch.empty_like(z, dtype=torch.uint8)
        for at in range(0, self.d, STEP):
            part = slice(at, at + STEP)
            wanted = z[..., part] + error[..., :at] @ self._feedback[:, :at, part]
            codes[..., part] = own = super().choose(wanted)
            error[..., part] = z[..., part] - self.level.index_select(0, own.view(-1).int()).view(own.shape)
        return codes

    def gain(self, y: Tensor, norm: Tensor, levels: Tensor) -> Tensor:
        """The error is at right angles to the row as the metric measures it."""
        plain = super().gain(y, norm, levels)
        if self.metric is None:
            return plain
        along = ((y / norm.clamp_min(1e-30)[..., None]).flatten(2, -2) @ self.metric).view(y.shape)
        found = (along * y).sum(-1) / (along * levels).sum(-1)
        return torch.where(found > 2 * plain, plain, found).clamp_min(plain / 2)  # few bits may give a row that points elsewhere

    def into(self, x: Tensor) -> Tensor:
        return (x.flatten(2, -2) @ self.forward).view(x.shape)

    def out_of(self, x: Tensor) -> Tensor:
        return (x.flatten(2, -2) @ self.back).view(x.shape)

    def query(self, q: Tensor) -> Tensor:
        return (q.float().flatten(2, -2) @ self.asking).view(q.shape)


def feedback(metric: Tensor) -> Tensor:
    """``F fp32 [H, d, d]`` for ``metric [H, d, d]``: coordinates ``t`` take ``e[:t] @ F[:t, t]`` more where those before them have the
    error ``e``. The last ones are as good as free, so blocks are eliminated from the end."""
    left, out = metric.double(), torch.zeros_like(metric)
    for at in range(metric.shape[-1] - STEP, 0, -STEP):
        beside = left[:, at:, :at]
        answer = torch.linalg.solve(left[:, at:, at:], beside)
        out[:, :at, at : at + STEP] = answer.mT
        left = left[:, :at, :at] - beside.mT @ answer
    return out


def shapes(c: Tensor, g: Tensor, shrink: float = 0.05) -> tuple[Tensor, Tensor]:
    """``A`` and ``M``, ``fp32 [H, d, d]``, for second moments ``c`` of rows and ``g`` of queries, both ``[H, d, d]``. ``shrink`` is the
    part of what lies off the diagonals that is not believed: moments come from a few thousand vectors."""
    c, g = c.double(), g.double()
    diagonal = lambda x: x.diagonal(dim1=-2, dim2=-1)  # noqa: E731
    floor = lambda x: diagonal(x) + 1e-6 * diagonal(x).mean(-1, keepdim=True) + 1e-30  # noqa: E731
    scale = (floor(c) / floor(g)).pow(0.25)  # first alike in all channels, so that shrinking knows no outliers
    alike = torch.diag_embed(1 / scale)
    values, vectors = torch.linalg.eigh(_shrunk(alike @ c @ alike, shrink))
    a = vectors @ torch.diag_embed(values.pow(-0.25)) @ vectors.mT @ alike
    a = a / torch.linalg.matrix_norm(a)[..., None, None] * a.shape[-1] ** 0.5
    inverse = torch.linalg.inv(a)
    return a.float(), _shrunk(inverse.mT @ g @ inverse, shrink).float()


def _shrunk(x: Tensor, shrink: float) -> Tensor:
    """``x [H, d, d]`` with a mean of 1 on the diagonal, drawn to the unit matrix."""
    x = x / x.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
    return (1 - shrink) * x + shrink * torch.eye(x.shape[-1], dtype=x.dtype)
