"""Inputs of a transformer's blocks that are kept from step to step, packed.

Some hosts keep the input of each block in place of its keys and values, which are made of it again at each step: half the numbers.
Channels of such inputs differ much in size (some are a hundred times the others), and all tokens share this. So each channel is centred
and divided by its deviation first, and what is left is coded as rows of values: rotated, one gain a row. Torch alone, no model library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codecs import split
from ..codecs.rows import Rows, rows
from ..codecs.split import Split
from ..types import nbytes
from .segments import SEGMENT
from .statistics import KeyStatistics, sample

LEAST = 256  # tokens under which the statistics of the channels are not worth their bytes
ROW = 128  # channels of a row, where the model's number of channels allows it


@dataclass(frozen=True)
class Activations:
    """``n`` tokens ``[B, n, channels]`` of one block.

    Attributes:
        codes: ``uint8 [B, channels / row, n, bytes]``; of tokens that are not packed the tokens themselves.
        gain: ``bf16 [B, channels / row, n]``, on axes of their own ``[..., 2]``; None where nothing is packed.
        statistics: mean and deviation of each channel, ``bf16 [B, channels / row, 1, row]``.
        dtype, device: of the tokens; codes may lie in host memory.
        why: the reason why nothing is packed; "" where it is.
        error: NMSE of the packed tokens, one fp32 number on the device.
    """

    codes: Tensor
    gain: Tensor | None
    statistics: KeyStatistics
    coder: Rows | Split | None
    dtype: torch.dtype
    device: torch.device
    why: str = ""
    error: Tensor | None = None

    @staticmethod
    def pack(x: Tensor, bits: int, seed: int = 0, host: bool = False) -> Activations:
        """Pack ``x [B, n, channels]``. ``host``: the codes lie in host memory."""
        x = x.detach()
        n, channels = x.shape[1], x.shape[2]
        row = next((d for d in (ROW, 64, 32, 16) if channels % d == 0), 0)
        if n < LEAST or not row:
            return Activations._exact(x, f"fewer than {LEAST} tokens" if row else f"{channels} channels are no multiple of 16")
        heads = x.unflatten(2, (-1, row)).transpose(1, 2)  # a view
        seen = sample(heads).float()
        statistics = KeyStatistics(seen.mean(2, keepdim=True).bfloat16(), seen.std(2, keepdim=True).clamp_min(1e-20).bfloat16())
        coder = split.coder(statistics.stored(seen), rows(row, bits, seed, x.device), n, seed)
        parts, wrong, energy = [], torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        for at in range(0, n, SEGMENT):
            own = heads[:, :, at : at + SEGMENT].float()
            codes, gain = coder.encode(statistics.stored(own))
            wrong += (statistics.restored(coder.decode(codes, gain)) - own).square().sum()
            energy += own.square().sum()
            parts.append((codes.cpu(), gain.cpu()) if host else (codes, gain))
        if not bool(wrong.isfinite()):
            return Activations._exact(x, "block inputs hold NaN or inf")
        codes, gain = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        return Activations(codes, gain, statistics, coder, x.dtype, x.device, error=wrong / energy.clamp_min(1e-30))

    @staticmethod
    def _exact(x: Tensor, why: str) -> Activations:
        return Activations(x.clone(), None, KeyStatistics(), None, x.dtype, x.device, why)

    def dense(self) -> Tensor:
        """The tokens ``[B, n, channels]``, decoded a segment at a time: the peak is little above the result."""
        if self.coder is None or self.gain is None:
            return self.codes.to(self.device)
        b, groups, n, _ = self.codes.shape
        out = torch.empty(b, n, groups, self.coder.d, dtype=self.dtype, device=self.device)
        for at in range(0, n, SEGMENT):
            codes, gain = (part[:, :, at : at + SEGMENT].to(self.device) for part in (self.codes, self.gain))
            out[:, at : at + SEGMENT] = self.statistics.restored(self.coder.decode(codes, gain)).transpose(1, 2)
        return out.flatten(2)

    def offload(self) -> Activations:
        """The same with its codes in host memory."""
        return replace(self, codes=self.codes.cpu(), gain=None if self.gain is None else self.gain.cpu())

    @property
    def tokens(self) -> int:
        return self.codes.shape[1] if self.gain is None else self.codes.shape[2]

    @property
    def numbers(self) -> int:
        """How many numbers the tokens are."""
        if self.gain is None or self.coder is None:
            return self.codes.numel()
        return self.gain.shape[:3].numel() * self.coder.d

    @property
    def nbytes(self) -> int:
        """Bytes of everything held; tables that a seed can rebuild are not counted."""
        basis = None if self.coder is None else self.coder.basis
        return nbytes([self.codes, self.gain, self.statistics.mean, self.statistics.scale, basis, self.error])
