"""Exact attention by whatever is fastest here: torch's fused one, or products and a softmax for a few queries at a time.

In bf16 the fused attention of CPUs does not use their bf16 units. Each size (tokens, width of
the heads, dtype) is timed once a process, on a few hundred queries. ``TQAI_DENSE=sdpa`` switches this off. Results differ by the
rounding of bf16. fp32 always stays with the fused attention, which is the faster one there, and so stays bit-exact.
"""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 256  # at a time
SCORES = 1 << 22  # bytes of them
SAMPLE = 512  # queries that are timed
GAIN = 1.15  # by this factor another way must be faster: a timing is noisy
_CHOSEN: dict[tuple, str] = {}


def off() -> bool:
    return os.environ.get("TQAI_DENSE", "").strip().lower() == "sdpa"


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of ``q [b, h, n, d]`` on ``k [b, h, m, d]``, ``v [b, h, m, dv]``, no mask."""
    if wanted(q, k, v):
        return products(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def wanted(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`attention` is faster than the fused one for these."""
    return choice(q, k, v) == "products"


def choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """``sdpa`` or ``products``; the first call of a size times both."""
    if off() or q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.ndim != 4 or q.shape[1] != k.shape[1]:
        return "sdpa"
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if learns or min(q.numel(), k.numel(), v.numel()) == 0 or torch.compiler.is_compiling():
        return "sdpa"
    n, d, m, dv = min(q.shape[2], SAMPLE), q.shape[3], k.shape[2], v.shape[3]
    key = (*(max(size - 1, 1).bit_length() for size in (n, m)), d, dv, q.dtype, torch.get_num_threads())
    if key not in _CHOSEN:
        _CHOSEN[key] = _measure(n, m, d, dv, q.dtype)
    return _CHOSEN[key]


def products(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(q k^T) v`` by two matrix products for a few queries of a head at a time; extra memory: their scores."""
    b, h, n, d = q.shape
    m, scale = k.shape[2], d**-0.5 if scale is None else scale
    out = q.new_empty(b, h, n, v.shape[3])
    step = max(min(QUERIES, SCORES // (m * q.element_size())), 16)
    with torch.no_grad():
        for i in range(b):
            for j in range(h):
                keys, values = k[i, j].mT, v[i, j]
                for at in range(0, n, step):
                    s = (q[i, j, at : at + step] * scale) @ keys
                    torch.mm(s.softmax(-1), values, out=out[i, j, at : at + step])
    return out


def _measure(n: int, m: int, d: int, dv: int, dtype: torch.dtype) -> str:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay the same
    q, k, v = (torch.randn(1, threads, *size, generator=generator).to(dtype) for size in ((n, d), (m, d), (m, dv)))
    return "products" if faster(*(partial(run, q, k, v) for run in (F.scaled_dot_product_attention, products))) else "sdpa"


def faster(usual: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether ``other`` takes clearly less time than ``usual``; of one thread its own time, which other programs do not change."""
    timer = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    was, now = (min(timeit.repeat(run, timer=timer, number=1, repeat=3)) for run in (usual, other))
    return now * GAIN < was
