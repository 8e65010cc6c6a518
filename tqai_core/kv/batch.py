"""Tokens on their way from the exact rows into the packed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import Rows
from ..codecs.split import Split


@dataclass
class PackBatch:
    """Tokens about to be packed in one layer. Keys and queries are as they are stored: centred, scaled, not rotated; queries
    are scaled by 1/sqrt(d) too, so that q.k is a score up to a number for all keys."""

    k: Tensor  # fp32 [B, H, n, D]
    v: Tensor  # fp32 [B, H, n, Dv]
    q: Tensor | None  # fp32 [B, H, group x recent queries, D]; None where an attention hides its queries
    first: int  # position of the first of them
    exact_rows: Callable[[], tuple[Tensor, Tensor, int]]  # all exact rows (k, v) and where these tokens begin in them
    coders: tuple[Rows, Rows | Split]  # of the base tier
    state: dict[str, Any] = field(default_factory=dict)  # of the method that is asked; tensors in it begin with the batch
    # what a policy decides of them
    predicted: Tensor | None = None  # part of ``k`` that its block predictor gives; the rest is packed
    coefficients: tuple[Tensor, Tensor] | None = None  # of the prediction: codes [B, H, blocks, terms, bytes], gains
    scores: Tensor | None = None  # importance [B, n]
    fine: Tensor | None = None  # bool [B, n]: tokens of the fine tier, as many in each sequence; None: none

    @property
    def rest(self) -> Tensor:
        """The part of the keys that rows hold."""
        return self.k if self.predicted is None else self.k - self.predicted

    @cached_property
    def all_finite(self) -> bool:
        return bool((self.k.isfinite().all() & self.v.isfinite().all()).item())

    def attention(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[B, H, queries, n]`` and output of the recent queries on rows ``k, v``."""
        assert self.q is not None
        p = (self.q @ k.transpose(-1, -2)).softmax(-1)
        return p, p @ v

    @cached_property
    def error(self) -> Tensor | None:
        """|change| / |output| of the recent queries' attention to the exact rows, were these tokens packed in the base tier."""
        if self.q is None:
            return None
        k, v, at = self.exact_rows()
        exact, n = self.attention(k, v)[1], self.k.shape[2]
        own_k, own_v = (coder.decode(*coder.encode(x)) for coder, x in zip(self.coders, (self.rest, self.v), strict=True))
        own_k = own_k if self.predicted is None else own_k + self.predicted
        changed = [torch.cat([x[:, :, :at], own, x[:, :, at + n :]], 2) for x, own in ((k, own_k), (v, own_v))]
        return (self.attention(*changed)[1] - exact).norm() / exact.norm().clamp_min(1e-30)
