"""The inputs of an attention in place of its keys and values, which follow from them: half the numbers, so twice the bits for each.

Keys and values of a token are two projections of one vector. Where that vector is no longer than one of them, to hold it takes half the
bytes: 8 bits of it cost what 4 bits of keys and values cost (XQuant 2508.10395 does this for language models). Each read projects again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.rows import BITS, Rows, rows
from ..types import nbytes

BLOCK = 64  # coordinates that share a rotation and a gain
CHUNK = 1024  # tokens that are projected together
WORTH = 2  # more bits than keys and values would have: fewer do not pay for the projection
AGREES = 1e-3  # NMSE of keys and values projected again from inputs that are not packed: rounding alone
Project = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # inputs [B, n, width] of the tokens from a number on -> k, v [B, n, H, D]


def bits_for(width: int, numbers: int, bits: int) -> int:
    """Bits of inputs of ``width`` that take no more than ``bits`` of a token's ``numbers`` of keys and values; 0 where rows do better."""
    found = max((b for b in BITS if b * width <= bits * numbers), default=0)
    return found if found >= bits + WORTH and width % BLOCK == 0 else 0


@dataclass(frozen=True)
class Inputs:
    """The inputs of one layer's ``n`` tokens, packed about their mean.

    Attributes:
        codes, gain: rows of ``BLOCK`` coordinates, ``uint8 [B, n, blocks, bytes]`` and ``bf16 [B, n, blocks]``.
        mean: of the tokens, ``[B, 1, width]`` in the model's dtype or bf16.
        project: gives keys and values.
        shapes, dtype, device: of the keys and values, and where they are read.
        numbers: how many the keys and values of all tokens are.
        beside: what ``project`` needs and this layer counts.
        error: NMSE of the keys and of the values that are read, two fp32 numbers on the device.
    """

    codes: Tensor
    gain: Tensor
    mean: Tensor
    coder: Rows
    project: Project
    shapes: tuple[torch.Size, torch.Size]
    dtype: torch.dtype
    device: torch.device
    numbers: int
    beside: list[Tensor]
    error: Tensor
    why: str = ""

    @staticmethod
    def pack(
        k: Tensor, v: Tensor, x: Tensor, bits: int, project: Project, beside: list[Tensor], seed: int = 0, host: bool = False
    ) -> Inputs | None:
        """Pack ``x [B, n, width]``, from which ``k, v [B, n, H, D]`` come; None where they do not, or where something is not finite.
        ``host``: the rows lie in host memory."""
        k, v, x = k.detach(), v.detach(), x.detach()
        if x.shape[:2] != k.shape[:2] or any(
            found.shape != own[:, :1].shape for found, own in zip(project(x[:, :1], 0), (k, v), strict=True)
        ):
            return None
        mean, coder = x.float().mean(1, keepdim=True).bfloat16(), rows(BLOCK, bits, seed, x.device)
        parts, wrong, energy = [], x.new_zeros(4, dtype=torch.float32), x.new_zeros(4, dtype=torch.float32)
        for a in range(0, x.shape[1], CHUNK):
            own = x[:, a : a + CHUNK]
            parts.append(coder.encode((own.float() - mean).unflatten(2, (-1, BLOCK))))
            wanted = k[:, a : a + CHUNK].float(), v[:, a : a + CHUNK].float()
            read = (*project(own, a), *project(_decoded(*parts[-1], mean, coder, x.dtype), a)) if a == 0 else ()
            read = read or (*wanted, *project(_decoded(*parts[-1], mean, coder, x.dtype), a))
            wrong += torch.stack([(found.float() - exact).square().sum() for found, exact in zip(read, wanted * 2, strict=True)])
            energy += torch.stack([exact.square().sum() for exact in wanted * 2])
        error = wrong / energy.clamp_min(1e-30)
        if not bool((error[:2] < AGREES).all() & error.isfinite().all()):
            return None
        codes, gain = (torch.cat(part, 1).to("cpu" if host else x.device) for part in zip(*parts, strict=True))
        return Inputs(
            codes, gain, mean, coder, project, (k.shape, v.shape), k.dtype, k.device, k.numel() + v.numel(), beside, error[2:].clone()
        )  # fmt: skip

    @property
    def length(self) -> int:
        return self.codes.shape[1]

    @property
    def packed(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of everything held; tables that a seed can rebuild are not counted, nor is what another layer counts."""
        return nbytes([self.codes, self.gain, self.mean, self.error, self.beside])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, n, H, D]``, projected a thousand tokens at a time."""
        k, v = (torch.empty(shape, dtype=self.dtype, device=self.device) for shape in self.shapes)
        for a in range(0, self.length, CHUNK):
            k[:, a : a + CHUNK], v[:, a : a + CHUNK] = self.part(a, CHUNK)
        return k, v

    def part(self, a: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of ``count`` tokens from number ``a`` on."""
        codes, gain = (x[:, a : a + count].to(self.device, non_blocking=True) for x in (self.codes, self.gain))
        return self.project(_decoded(codes, gain, self.mean, self.coder, self.dtype), a)


def _decoded(codes: Tensor, gain: Tensor, mean: Tensor, coder: Rows, dtype: torch.dtype) -> Tensor:
    return coder.decode(codes, gain).flatten(2).add_(mean).to(dtype)
