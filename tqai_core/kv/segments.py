"""Packed rows of one attention layer: on their way in, as they are held, and as attention reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import Rows
from ..codecs.split import Split

AGAIN = "save the cache again"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEGMENT = 1024  # tokens of a full segment


def flush(recent: int) -> int:
    """See :attr:`Plan.flush`."""
    return 32 if recent >= 16 or recent == 0 else 16


@dataclass(frozen=True)
class Plan:
    """How one layer is held. ``calibrate``: tokens to wait for before statistics are taken; 0 stores keys as they are."""

    bits_k: int = 4
    bits_v: int = 4
    sink: int = 4
    recent: int = 64
    calibrate: int = 256
    seed: int = 0

    @property
    def flush(self) -> int:
        """Tokens that leave the recent window together: fewer where it is short, or those that wait would be most of it."""
        return flush(self.recent)


@dataclass
class Segment:
    """Packed rows of consecutive tokens: codes ``uint8 [B, H, n, bytes]``, gains ``bf16 [B, H, n]``, of split values
    ``[B, H, n, 2]``; all contiguous."""

    codes_k: Tensor
    gain_k: Tensor
    codes_v: Tensor
    gain_v: Tensor

    def __len__(self) -> int:
        return self.gain_k.shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``change(tensor)``, one at a time: the peak is one tensor above what is held."""
        for name, tensor in vars(self).items():
            setattr(self, name, change(tensor).contiguous())

    def join(self, other: Segment) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, torch.cat([tensor, getattr(other, name)], dim=2))


@dataclass(frozen=True)
class BitTier:
    """What attention reads of the tokens that are packed with the same bits. The exact rows belong to the first tier of a
    cache; the other one has none. A query meets stored keys as ``q . mean + (q * scale) . key``."""

    keys: Tensor  # exact rows [B, H, n, D], in the model's dtype
    values: Tensor
    segments: Sequence[Segment]
    coder_k: Rows
    coder_v: Rows | Split
    mean: Tensor | None  # fp32 [B, H, 1, D]; None: keys are stored as they are
    scale: Tensor | None
    sinks: int  # exact rows before the packed ones
    packed: int  # packed rows
    order: Tensor | None = None  # int64 [B, packed]: the packed tokens that the rows hold; None: all in order, or not asked for

    @property
    def length(self) -> int:
        return self.keys.shape[2] + self.packed


@dataclass(frozen=True)
class Adjustment:
    """What methods change in the attention to the packed rows of a tier: ``offsets [B, H, rows of q, packed]`` are added to the
    scores, and only the blocks of ``block`` rows that ``read``, bool ``[B, H, blocks]``, marks are read."""

    offsets: Tensor | None = None
    read: Tensor | None = None
    block: int = 1


UNCHANGED = Adjustment()


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
    real: Tensor | None = None  # bool [B, exact rows]: which of them are no padding; None: all
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
        scores = self.q @ k.transpose(-1, -2)
        if self.real is not None:
            scores = scores.masked_fill(~self.real[:, None, None], float("-inf"))
            v = v.where(self.real[:, None, :, None], 0)  # padding may hold no numbers at all
        p = scores.softmax(-1)
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


def rows_in(segments: Sequence[Segment]) -> int:
    return sum(map(len, segments))


def encode(k: Tensor, v: Tensor, coder_k: Rows, coder_v: Rows | Split) -> tuple[Segment, bool]:
    """Rows of keys in their stored form and of values, and whether all of them are finite."""
    segment = Segment(*coder_k.encode(k), *coder_v.encode(v))
    return segment, bool((segment.gain_k.isfinite().all() & segment.gain_v.isfinite().all()).item())


def extend(segments: list[Segment], new: Segment) -> None:
    """Put rows at the end of ``segments``. They grow in segments of at most ``SEGMENT`` rows, so a short tail is copied at most."""
    if segments and len(segments[-1]) + len(new) <= SEGMENT:
        segments[-1].join(new)
    else:
        segments.append(new)


def cut(segments: list[Segment], count: int) -> None:
    """Keep the first ``count`` rows of ``segments``."""
    while (extra := rows_in(segments) - count) > 0 and extra >= len(segments[-1]):
        segments.pop()
    if extra > 0:
        segments[-1].map(lambda x: x[:, :, :-extra].clone())  # a view would keep the rest alive
