"""Rows on their own axes: the directions that hold most of the energy keep more bits than the rest.

Values of a trained model lie near a subspace: in the mini LM a quarter of the axes holds nearly all of the energy. The first
``r`` axes span that subspace, the others the rest; each part is coded as rows of its own (:mod:`codecs.rows`: rotation,
levels, one gain), so a token that leaves the subspace is still coded, with the error of the fewer bits.

The axes are a product of ``r`` Householder reflections, one int8 vector each: ``r`` bytes a dimension and head instead of a
matrix, and orthogonal whatever the rounding. They are shared by all sequences of a batch. Keys gain nothing: their
scaling has evened them out, and rotary positions turn what is left.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from .rows import Rows, rows

NMSE = {2: 0.1175, 3: 0.0345, 4: 0.0095, 5: 0.0025, 6: 0.00067, 8: 0.0001}  # of rows, Gaussian
UNIT = 32  # axes of the first part come in multiples of this, as native kernels read them
TOKENS = 2048  # over which the bytes of the axes must pay
WORTH = 0.8  # of the plain error, on tokens that the axes were not made from


class Split:
    """Coder of rows ``[B, H, ..., d]`` of one layer; a :class:`Rows` of two runs. ``basis int8 [H, r, d]``."""

    def __init__(self, d: int, bits: tuple[int, int], basis: Tensor, seed: int) -> None:
        r = basis.shape[1]
        self.d, self.basis = d, basis
        self.runs = (rows(r, bits[0], seed, basis.device), rows(d - r, bits[1], seed + 2, basis.device))
        self.row_bytes = sum(run.row_bytes for run in self.runs)

    def head(self, h: int) -> Split:
        """The coder of one head."""
        own = copy(self)
        own.basis = self.basis[h : h + 1]
        return own

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x fp32 [B, H, n, d]`` -> codes ``uint8 [B, H, n, row_bytes]``, gains ``bf16 [B, H, n, 2]``."""
        y = reflect(x, self.basis)
        parts = [run.encode(own.contiguous()) for run, own in zip(self.runs, self.cut(y), strict=True)]
        return torch.cat([codes for codes, _ in parts], -1), torch.stack([gain for _, gain in parts], -1)

    def decode(self, codes: Tensor, gain: Tensor) -> Tensor:
        return reflect(torch.cat([run.decode(c, g) for run, c, g in self.parts(codes, gain)], -1), self.basis, back=True)

    def parts(self, codes: Tensor, gain: Tensor) -> list[tuple[Rows, Tensor, Tensor]]:
        sizes = [run.row_bytes for run in self.runs]
        return list(zip(self.runs, codes.split(sizes, -1), gain.unbind(-1), strict=True))

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """A tensor ``[..., d]`` by runs; views."""
        return x.split([run.d for run in self.runs], -1)

    def rotate(self, x: Tensor) -> Tensor:
        """``x [B, H, ..., d]`` into the domain of the levels, fp32."""
        return torch.cat([run.rotate(own) for run, own in zip(self.runs, self.cut(reflect(x.float(), self.basis)), strict=True)], -1)

    def unrotate(self, x: Tensor) -> Tensor:
        return reflect(torch.cat([run.unrotate(own) for run, own in zip(self.runs, self.cut(x), strict=True)], -1), self.basis, back=True)


def reflect(x: Tensor, basis: Tensor, back: bool = False) -> Tensor:
    """``x fp32 [B, H, n, d]`` times the product of all reflections I - 2 v v' / v'v, or of its inverse: three small products
    (I - V' T V with T triangular; Schreiber and Van Loan 1989)."""
    v = basis.float()
    gram = v @ v.mT
    upper = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    along = x @ v.mT
    # T is the inverse of ``upper``; the inverse of an orthogonal product is its transpose
    return x - torch.linalg.solve_triangular(upper.mT if back else upper, along, upper=not back, left=False) @ v


def axes(c: Tensor, r: int) -> Tensor:
    """Reflections ``int8 [H, r, d]`` whose first ``r`` new axes span the main subspace of the second moments ``c [H, d, d]``."""
    h, d, _ = c.shape
    left = torch.linalg.eigh(c)[1].flip(-1)[..., :r].mT.clone()  # rows: what is still to be reflected onto the axes
    out = c.new_zeros(h, r, d)
    for i in range(r):
        v = left[:, i].clone()
        v[:, :i] = 0
        norm = torch.linalg.vector_norm(v, dim=-1)
        v[:, i] += torch.where(v[:, i] < 0, -norm, norm)
        v = (v * (127 / v.abs().amax(-1, keepdim=True).clamp_min(1e-30))).round()
        v[:, i] = torch.where(v.abs().amax(-1) == 0, 1.0, v[:, i])
        # what follows is turned by the rounded one, so that rounding does not add up
        left -= (2 * (left @ v[..., None]) / v.square().sum(-1)[:, None, None]) * v[:, None]
        out[:, i] = v
    return out.to(torch.int8)


def plan(x: Tensor, bits: int, tokens: int) -> tuple[tuple[int, int], Tensor] | None:
    """Bits of the two parts and their axes for values like ``x fp32 [B, H, n, d]``, or None where plain rows of ``bits`` are
    about as good. The bytes never exceed those of plain rows, axes included, over ``tokens`` of each sequence or 2048."""
    b, _, _, d = x.shape
    even, odd = (x[:, :, i::2].transpose(0, 1).flatten(1, 2) for i in (0, 1))
    if bits not in NMSE or bits == 8 or odd.shape[1] < 2 * d:
        return None
    moments = even.mT @ even
    best, found = WORTH * NMSE[bits], None
    for r in range(UNIT, d // 2 + 1, UNIT):
        turned = odd @ torch.linalg.eigh(moments)[1].flip(-1)
        shares = turned.square().mean(1)
        top = (shares[:, :r].sum(-1) / shares.sum(-1).clamp_min(1e-30)).mean()
        side = 16 / d + 8 * r / (b * max(tokens, TOKENS))
        for first in NMSE:
            for rest in NMSE:
                if first <= rest or (first * r + rest * (d - r)) / d + side > bits:
                    continue
                error = float(top * NMSE[first] + (1 - top) * NMSE[rest])
                if error < best:
                    best, found = error, (r, (first, rest))
    if found is None:
        return None
    return found[1], axes(moments + odd.mT @ odd, found[0])


def coder(x: Tensor, plain: Rows, tokens: int, seed: int) -> Rows | Split:
    """For ``tokens`` values like ``x fp32 [B, H, n, d]`` that are all known: rows on axes of their own where that pays, else ``plain``."""
    found = plan(x, plain.bits, tokens) if tokens >= TOKENS else None
    return plain if found is None else Split(x.shape[-1], *found, seed)
