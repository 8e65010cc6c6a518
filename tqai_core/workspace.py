"""Memory that the steps of one computation reuse: touching fresh pages costs more than the arithmetic on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Buffers by name. ``device`` and ``dtype`` are those of a tensor for which :meth:`take` is given none.

    A buffer grows to the largest tensor asked for by its name and lives as long as the workspace.
    """

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self._memory: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # a call often asks for the same tensor again: three views spared

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A contiguous tensor with undefined content, valid until the next call with this ``name``."""
        dtype, device, last = dtype or self.dtype, device or self.device, self._last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype and last.device == device:
            return last
        size, memory = math.prod(shape) * dtype.itemsize, self._memory.get(name)
        if memory is None or memory.numel() < size or memory.device != device:
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=device)
        self._last[name] = taken = memory[:size].view(dtype).view(shape)
        return taken
