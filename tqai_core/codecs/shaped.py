"""Rows whose error is shaped: before the rotation each head has a matrix of its own, from a file of ``tqai calibrate``.

A row ``x`` is coded as ``A x`` and read as the inverse of it, so that its error is white after ``A`` and shaped before. With second
moments ``C`` of the rows and ``G`` of what an error costs (of the queries for keys, of the output's gradient for values), ``E x'Gx`` of
the error is least for the ``A`` that makes ``A C A'`` and ``A^-T G A^-1`` the same diagonal matrix. A query meets coded keys as
``A^-T q``; the sum of coded values comes back by ``A^-1``, once. So reading costs nothing, and the bytes of a row stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Rows


class Shaped(Rows):
    """A coder of rows ``[B, H, ..., d]`` with the tables of ``plain``; ``shape fp32 [H, d, d]`` has the matrices ``A``."""

    def __init__(self, plain: Rows, shape: Tensor) -> None:
        vars(self).update(vars(plain))
        self.runs = (self,)
        self.forward = (shape.mT @ plain.forward).contiguous()
        self.back = torch.linalg.inv(self.forward).contiguous()
        self.asking = self.back.mT.contiguous()

    def into(self, x: Tensor) -> Tensor:
        return (x.flatten(2, -2) @ self.forward).view(x.shape)

    def out_of(self, x: Tensor) -> Tensor:
        return (x.flatten(2, -2) @ self.back).view(x.shape)

    def query(self, q: Tensor) -> Tensor:
        return (q.float().flatten(2, -2) @ self.asking).view(q.shape)


def shapes(c: Tensor, g: Tensor, shrink: float = 0.05) -> Tensor:
    """The matrices ``A fp32 [H, d, d]`` for second moments ``c`` of rows and ``g`` of what an error costs, both ``[H, d, d]``. ``shrink``
    is the part of what lies off the diagonals that is not believed: moments come from a few thousand vectors."""
    c, g = c.double(), g.double()
    diagonal = lambda x: x.diagonal(dim1=-2, dim2=-1)  # noqa: E731
    floor = lambda x: diagonal(x) + 1e-6 * diagonal(x).mean(-1, keepdim=True) + 1e-30  # noqa: E731
    scale = (floor(c) / floor(g)).pow(0.25)  # first alike in all channels, so that shrinking knows no outliers
    alike = torch.diag_embed(1 / scale)
    c, g = alike @ c @ alike, torch.diag_embed(scale) @ g @ torch.diag_embed(scale)
    c, g = ((1 - shrink) * x + shrink * torch.diag_embed(floor(x)) for x in (c, g))
    values, vectors = torch.linalg.eigh(g)
    root = vectors @ torch.diag_embed(values.clamp_min(1e-30).sqrt()) @ vectors.mT
    least = torch.linalg.eigh(root @ c @ root)
    a = torch.diag_embed(least[0].clamp_min(1e-30).pow(-0.25)) @ least[1].mT @ root @ alike
    return (a / torch.linalg.matrix_norm(a)[..., None, None] * a.shape[-1] ** 0.5).float()
