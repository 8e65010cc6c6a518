"""How a chunk of vLLM's host memory lies: pages of layers and blocks, seen as ``[2, L, H, blocks, N, D]`` without a copy.

::

  chunk: rank 0 | rank 1 | ... | padding         rank, layouts L...: layer by layer, in it block by block
                                                 rank, layouts B...: block by block, in it layer by layer
  page of a layer's block: [H, N, K|V] (...HNC) or [N, H, K|V] (...NHC)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")  # names of vLLM, outermost first


@dataclass(frozen=True)
class Pages:
    """``heads`` are those of one rank, ``tokens`` of one block; ``blocks`` make a chunk."""

    layout: str
    ranks: int
    layers: int
    blocks: int
    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of a chunk, padding aside."""
        return 2 * self.ranks * self.layers * self.blocks * self.heads * self.tokens * self.dim * self.dtype.itemsize

    def unsupported(self) -> str:
        """Why such chunks cannot be packed; empty where they can."""
        if self.layout not in LAYOUTS:
            return f"the cache has the layout {self.layout}"
        if self.layout.startswith("B") and self.blocks > 1 and self.ranks > 1:
            return f"the cache has the layout {self.layout} over {self.ranks} ranks with {self.blocks} blocks a chunk"
        return ""

    def view(self, chunk: Tensor) -> Tensor:
        """``chunk uint8 [bytes]`` as ``[2, ranks x L, H, blocks, N, D]``; what is written there is written into the chunk."""
        page = (self.heads, self.tokens) if "HN" in self.layout else (self.tokens, self.heads)
        outer = (self.ranks * self.layers, self.blocks) if self.layout.startswith("L") or self.blocks == 1 else (self.blocks, self.layers)
        x = chunk[: self.nbytes].view(self.dtype).view(*outer, *page, 2, self.dim)
        if outer[0] == self.blocks and self.layout.startswith("B") and self.blocks > 1:
            x = x.transpose(0, 1)
        if page[0] != self.heads or "NH" in self.layout:
            x = x.transpose(2, 3)
        return x.permute(4, 0, 2, 1, 3, 5)
