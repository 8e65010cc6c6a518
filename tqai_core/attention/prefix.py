"""Attention to packed prefixes and the exact tokens beside them, read in place: a few hundred tokens are decoded at a time.

Packed rows are never turned back: queries go to their axes once, the weighted sum of values comes back once. What the mean of the keys
adds to all scores of a query is added to the logarithm of its weight. Parts are joined by those logarithms (Milakov and Gimelshein
1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..codecs.rows import Rows, Scratch
from ..codecs.split import Split
from ..kv.inputs import Inputs
from ..kv.prefix import Prefix
from ..kv.segments import BitTier, Segment

TOKENS, QUERIES = 512, 1024  # that meet at a time, of one head: the memory beside the output is some 2 MiB at a dimension of 128
COARSE = 6  # bits of keys or values up to which bfloat16 is good enough for both
Run = Prefix | Inputs
Part = Tensor | Run  # of a sequence of tokens; tensors are [B, n, H, D]


def attend(q: Tensor, keys: Sequence[Part], values: Sequence[Part], scale: float | None = None) -> Tensor:
    """``softmax(scale q k^T) v`` of ``q [B, H, m, D]`` on a CPU, without a mask; ``keys`` and ``values`` have the same parts."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    runs = [part for part in keys if not isinstance(part, Tensor)]
    exact = [[part for part in parts if isinstance(part, Tensor)] for parts in (keys, values)]
    for run in runs:
        if isinstance(run, Prefix) and run.tier.keys.shape[2]:
            exact[0].append(run.tier.keys.transpose(1, 2))
            exact[1].append(run.tier.values.transpose(1, 2))
    width = exact[1][0].shape[-1]
    state = State(q.new_zeros(*q.shape[:1], q.shape[2], q.shape[1], width, dtype=torch.float32).transpose(1, 2),
                  q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32))  # fmt: skip
    tiers = [run.readable() for run in runs if isinstance(run, Prefix) and run.packed]
    for b, h in _heads(q):
        own_k, own_v = (torch.cat([part[b, :, h] for part in parts])[None, None] for parts in exact)
        for at, some in _blocks(q, b, h):
            state.add(b, h, at, *partial(some, own_k, own_v, scale))
        del own_k, own_v
        for tier in tiers:
            _rows(q, tier, b, h, scale, state)
    for run in runs:
        if isinstance(run, Inputs):
            _inputs(q, run, scale, state)
    return state.out.to(q.dtype)


@dataclass(frozen=True)
class State:
    """The softmax over some tokens: outputs ``fp32 [B, H, m, D]`` and logarithms of their weights ``[B, H, m]``."""

    out: Tensor
    log: Tensor

    def add(self, b: int, h: int, at: slice, out: Tensor, log: Tensor) -> None:
        """Join the softmax of other tokens ``[1, 1, rows, D]``, ``[1, 1, rows]`` of one head."""
        _join(self.out[b, h, at], self.log[b, h, at], out[0, 0], log[0, 0])


def _join(out: Tensor, log: Tensor, new: Tensor, new_log: Tensor) -> None:
    both = torch.logaddexp(log, new_log)
    out.mul_((log - both).exp_()[:, None]).add_(new.float().mul_((new_log - both).exp_()[:, None]))
    log.copy_(both)


def partial(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention ``[1, 1, m, D]`` to some tokens, and the logarithms of the weights."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)  # type: ignore[no-any-return]


def rough(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by products of bfloat16, of queries that have the scale: their rounding is far below the error of packed rows."""
    scores = q @ k.mT
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    log = scores.amax(-1).float() - weights.amax(-1).log()
    return weights.bfloat16() @ v, log


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it, which take a quarter of the time of fp32."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def _heads(q: Tensor) -> Iterator[tuple[int, int]]:
    return ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1]))


def _blocks(q: Tensor, b: int, h: int) -> Iterator[tuple[slice, Tensor]]:
    for i in range(0, q.shape[2], QUERIES):
        at = slice(i, i + QUERIES)
        yield at, q[None, None, b, h, at].contiguous()


def _inputs(q: Tensor, run: Inputs, scale: float, state: State) -> None:
    """Keys and values that are projected again, some tokens of all heads at a time."""
    for a in range(0, run.length, TOKENS):
        k, v = run.part(a, TOKENS)
        for b, h in _heads(q):
            own_k, own_v = (x[None, None, b, :, h].contiguous() for x in (k, v))
            for at, some in _blocks(q, b, h):
                state.add(b, h, at, *partial(some, own_k, own_v, scale))


def _rows(q: Tensor, tier: BitTier, b: int, h: int, scale: float, state: State) -> None:
    """Packed rows of one head, on their own axes."""
    coder = tier.coder_v.head(h) if isinstance(tier.coder_v, Split) else tier.coder_v
    mean, stretch = (None if x is None else x[b, h] for x in (tier.mean, tier.scale))
    coarse = multiplies_bfloat16() and min(tier.coder_k.bits, *(run.bits for run in coder.runs)) <= COARSE
    dtype = torch.bfloat16 if coarse else q.dtype
    for at, some in _blocks(q, b, h):
        some = some.float()
        turned = tier.coder_k.rotate(some if stretch is None else some * stretch)
        turned = turned.mul_(scale if coarse else 1.0).to(dtype)
        out = log = None
        for k, v in _decoded(tier.segments, tier.coder_k, coder, b, h, dtype):
            new, new_log = rough(turned, k, v) if coarse else partial(turned, k, v, scale)
            if out is None or log is None:
                out, log = new.float(), new_log
            else:
                _join(out[0, 0], log[0, 0], new[0, 0], new_log[0, 0])
        assert out is not None
        assert log is not None
        if mean is not None:
            log = log + (some * mean).sum(-1) * scale
        state.add(b, h, at, coder.unrotate(out), log)


def _decoded(
    segments: Sequence[Segment], coder_k: Rows, coder_v: Rows | Split, b: int, h: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Levels of keys and values of one head, ``TOKENS`` at a time, in memory that the next ones overwrite."""
    scratch = [Scratch() for _ in range(3)]
    for segment in segments:
        for a in range(0, len(segment), TOKENS):
            codes_k, gain_k, codes_v, gain_v = (x[None, None, b, h, a : a + TOKENS] for x in vars(segment).values())
            k = coder_k.lookup(codes_k, scratch[0]).mul_(gain_k[..., None])
            parts = [run.lookup(codes, own).mul_(gain[..., None])
                     for own, (run, codes, gain) in zip(scratch[1:], coder_v.parts(codes_v, gain_v), strict=False)]  # fmt: skip
            v = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            yield k.to(dtype), v.to(dtype)
