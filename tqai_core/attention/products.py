"""Products with packed rows: queries with keys, weights with values, a piece that stays in the CPU's cache at a time.

In floats, each level is looked up as four bytes. Where the CPU multiplies bytes (AVX512-VNNI), the levels of keys of 2, 3, 4 and 8
bits are looked up as one byte each, four at a time, and queries of 16 bits are written as two digits of base 128: products of
integers are exact, and the digits keep 15 bits. Values gain nothing from it: their weights would have to be taken apart at
each step.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..codecs.rows import Rows, Scratch

CHUNK = 1 << 17  # coordinates looked up at a time on a CPU: half a MiB of fp32 stays in its cache
FEW = 64  # queries of a head up to which looking up is what costs


@lru_cache
def multiplies_bytes() -> bool:
    """Whether torch has products of bytes that this CPU has instructions for."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)()) and hasattr(torch, "_int_mm")


class Queries:
    """Rotated queries ``fp32 [B x H, r, d]`` that meet keys of ``coder``; ``precise`` keeps all their bits."""

    def __init__(self, q: Tensor, coder: Rows, precise: bool) -> None:
        self.q, self.coder = q, coder
        self.unit: Tensor | None = None
        if q.device.type == "cpu" and q.shape[1] <= FEW and coder.step and not precise and multiplies_bytes():
            unit = q.abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(127 * 128)
            whole = (q / unit).round_()
            first = (whole / 128).round_()
            self.digits = torch.cat([first, whole.sub_(first, alpha=128)], 1).to(torch.int8)
            self.unit = unit * coder.step

    def scores(self, codes: Tensor, out: Tensor, scratch: Scratch, chosen: list[Tensor | slice] | None = None) -> None:
        """Products with the levels of ``codes uint8 [B, H, n, bytes]``, in units of ``unit`` where it is set, into ``out
        [B x H, r, n]``. ``chosen``: the rows that each head reads, all others give 0; wants precise queries."""
        codes = codes.flatten(0, 1)
        if chosen is not None:
            for own, theirs, to, rows in zip(self.q, codes, out.zero_(), chosen, strict=True):
                if len(some := theirs[rows]):
                    to[:, rows] = own @ self.coder.lookup(some).T
            return
        if self.unit is None:
            pieces = _pieces(codes, self.coder)
            for own, theirs, to in zip(self.q.chunk(pieces), codes.chunk(pieces), out.chunk(pieces), strict=True):
                torch.bmm(own, self.coder.lookup(theirs, scratch).transpose(1, 2), out=to)
            return
        sums = scratch.take("products", (*self.digits.shape[:2], codes.shape[1]), torch.int32, codes.device)
        for own, theirs, to in zip(self.digits.unbind(), codes.unbind(), sums.unbind(), strict=True):
            torch._int_mm(own, self.coder.lookup_bytes(theirs, scratch).t(), out=to)
        first, second = sums.chunk(2, 1)
        torch.add(second, first, alpha=128, out=out)  # below 2^31 for rows of up to 1024
        if self.coder.bits == 8:
            out += (self.q.sum(-1, keepdim=True) * (self.coder.step / 2)).div_(self.unit)


def add_values(
    weights: Tensor, codes: Tensor, coder: Rows, sums: Tensor, scratch: Scratch, chosen: list[Tensor | slice] | None = None
) -> None:
    """Adds to ``sums fp32 [B x H, r, d]`` the levels of ``codes uint8 [B, H, n, bytes]`` times ``weights [B x H, r, n]``, of the
    ``chosen`` rows of each head alone where they are given."""
    codes = codes.flatten(0, 1)
    if chosen is not None:
        for own, theirs, to, rows in zip(weights, codes, sums, chosen, strict=True):
            if len(some := theirs[rows]):
                to += own[:, rows] @ coder.lookup(some)
        return
    pieces = _pieces(codes, coder)
    for own, theirs, to in zip(weights.chunk(pieces), codes.chunk(pieces), sums.chunk(pieces), strict=True):
        to.baddbmm_(own, coder.lookup(theirs, scratch))


def _pieces(codes: Tensor, coder: Rows) -> int:
    """In how many pieces the heads of all sequences are looked up."""
    return 1 if codes.device.type != "cpu" else -(-len(codes) // max(CHUNK // (codes.shape[1] * coder.d), 1))
