"""Block-sparse attention as a Triton kernel: lists of key blocks, the far field fused into the same online softmax.

The far field costs no pass of its own: its linear form is the state in which the online softmax begins, its centroid form one
more block of keys for every ``BLOCK`` centroids, clusters are blocks too. Checked with Triton's interpreter
(``TRITON_INTERPRET=1``, fp32 and fp16), not timed on a GPU, and so asked for: ``TQAI_TRITON=1``.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...workspace import Workspace
from ..blocks import Blocks
from ..far_field import far_field

ROWS = 64  # queries of a program


def wanted(q: Tensor) -> bool:
    """Asked for by ``TQAI_TRITON=1``, installed, and on a device of Triton or of its interpreter."""
    known = q.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return os.environ.get("TQAI_TRITON") == "1" and known and importlib.util.find_spec("triton") is not None


def takes(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: str | None, asked: bool = False) -> str:
    if not asked:  # before a search for Triton, which takes longer than a small attention
        return "" if wanted(q) else "TQAI_TRITON=1 is not set, Triton is not installed or has no such device"
    return "" if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: str | None) -> Tensor:
    """See :func:`sparse.block_attention`."""
    import triton

    b, h, n, d = q.shape
    m, dv, bq, bk = k.shape[2], v.shape[3], blocks.block_q, blocks.block_k
    nq, num_blocks = blocks.index.shape[2:]
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = q.new_empty(b, h, n, dv)
    index = blocks.index.to(torch.int32)
    if blocks.live is not None:
        index = index.masked_fill(~blocks.live, -1)
    index = index.flatten(0, 1).contiguous()
    keys = q.new_ones(1, dtype=torch.uint8) if blocks.keys is None else blocks.keys.contiguous().view(torch.uint8)
    fk = fv = fb = slope = near_k = near_v = q.new_zeros(1)
    near, extra, fine = index, 0, 0
    if far is not None:
        heads = None if blocks.keys is None else blocks.keys.repeat_interleave(h, 0)
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        found = far_field(flat_q, flat_k, flat_v, heads, blocks.unselected(), blocks, far, Workspace(q.device, q.dtype))
        extra, fine = found.key.shape[1], found.finer
        if found.near is not None:
            near, near_k, near_v = found.near.index.int(), found.near.key, found.near.value
        fk, fv, fb = (x.contiguous() for x in (found.key, found.value, found.bias.float()))
        slope = found.moments.contiguous()  # [bh, d, dv]
        if found.mean is not None:  # [bh nq, d, dv + d]
            slope = (slope.float() - found.mean[..., dv:].float().mT * found.mean.float()).to(q.dtype)
    rows = min(ROWS, max(triton.next_power_of_2(bq), 16))
    run: Any = _kernel()
    run[(nq * triton.cdiv(bq, rows), b * h)](
        q, k, v, out, index, keys, fk, fv, fb, slope, near, near_k, near_v,
        n, m, h, nq, num_blocks, d, dv, bq, bk, extra, near.shape[-1] if fine else 0, fine // near.shape[-1], d**-0.5,
        KEYS=blocks.keys is not None, FAR=0 if far is None else 1 if far == "linear" else 2,
        ROWS=rows, BLOCK=max(triton.next_power_of_2(bk), 16), D=max(triton.next_power_of_2(d), 16), DV=max(triton.next_power_of_2(dv), 16),
    )  # fmt: skip
    return out


@cache
def _kernel() -> Any:
    """Triton is imported at the first use, not before."""
    import triton
    import triton.language as tl

    globals()["tl"] = tl  # where the kernels look their names up

    @triton.jit
    def fold(q, key, value, bias, top, weight, total, at, av, d, dv, seen):  # type: ignore[no-untyped-def]
        """One block of keys into the online softmax. ``key``, ``value``: pointers to rows; ``bias [keys]`` is added, -inf hides."""
        k = tl.load(key + at[None, :], mask=seen[:, None] & (at < d)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") + bias[None, :]
        high = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - high[:, None])
        keep = tl.exp(top - high)
        v = tl.load(value + av[None, :], mask=seen[:, None] & (av < dv)[None, :], other=0.0)
        total = total * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        return high, weight * keep + tl.sum(p, 1), total

    globals().update(fold=fold)

    @triton.jit
    def sparse(  # type: ignore[no-untyped-def]
        q, k, v, out, index, keys, far_key, far_value, far_bias, slope, near, near_key, near_value,
        n, m, heads, nq, num_blocks, d, dv, block_q, block_k, extra, few, size, scale,
        KEYS: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    ):  # fmt: skip
        parts = tl.cdiv(block_q, ROWS)
        block, head = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
        token = block * block_q + row
        real = (row < block_q) & (token < n)
        at, av, one = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, BLOCK)
        inside_d, inside_v = at < d, av < dv
        kind = q.dtype.element_ty
        own = tl.load(q + (head * n + token[:, None]) * d + at[None, :], mask=real[:, None] & inside_d[None, :], other=0.0)
        own = (own.to(tl.float32) * scale).to(kind)
        top = tl.full((ROWS,), -1e30, tl.float32)  # finite: a query that sees nothing weighs nothing
        weight = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DV), tl.float32)
        line = head * nq + block
        if FAR == 1:  # one key: the state in which the softmax begins
            key = tl.load(far_key + line * d + at, mask=inside_d, other=0.0).to(tl.float32)
            top = tl.maximum(tl.sum(own.to(tl.float32) * key[None, :], 1) + tl.load(far_bias + line), -1e30)
            weight += 1.0
            value = tl.load(far_value + line * dv + av, mask=inside_v, other=0.0).to(tl.float32)
            total += value[None, :]
        if FAR == 2:
            for i in range(0, tl.cdiv(extra, BLOCK)):
                column = i * BLOCK + one
                seen = column < extra
                bias = tl.load(far_bias + line * (few * size + extra) + few * size + column, mask=seen, other=float("-inf"))
                place = (head * extra + column)[:, None]
                top, weight, total = fold(own, far_key + place * d, far_value + place * dv, bias, top, weight, total, at, av, d, dv, seen)
        if FAR > 0:
            width = dv + d if FAR == 1 else dv
            place = slope + (line if FAR == 1 else head) * d * width + at[:, None] * width
            change = tl.load(place + av[None, :], mask=inside_d[:, None] & inside_v[None, :], other=0.0)
            total += weight[:, None] * tl.dot(own, change, input_precision="ieee")
            if FAR == 1:  # its own variance along the far keys widens their mass
                spread = tl.load(place + dv + at[None, :], mask=inside_d[:, None] & inside_d[None, :], other=0.0)
                var = tl.sum(tl.dot(own, spread, input_precision="ieee") * own.to(tl.float32), 1)
                top += tl.log(1.0 + tl.maximum(0.5 * var, 0.0))
        for i in range(0, few):  # their blocks by clusters
            place = (tl.load(near + line * few + i).to(tl.int64) * size + one)[:, None]
            seen = one < size
            bias = tl.load(far_bias + line * (few * size + extra) + i * size + one, mask=seen, other=float("-inf"))
            top, weight, total = fold(own, near_key + place * d, near_value + place * dv, bias, top, weight, total, at, av, d, dv, seen)
        for i in range(0, num_blocks):
            which = tl.load(index + line * num_blocks + i)
            column = tl.where(which >= 0, which, m) * block_k + one  # one named before counts once: beyond the end
            seen = (one < block_k) & (column < m)
            if KEYS:
                seen = seen & (tl.load(keys + head // heads * m + column, mask=seen, other=0) > 0)
            bias = tl.where(seen, 0.0, float("-inf"))
            place = (head * m + column)[:, None]
            top, weight, total = fold(own, k + place * d, v + place * dv, bias, top, weight, total, at, av, d, dv, seen)
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + (head * n + token[:, None]) * dv + av[None, :], total.to(kind), mask=real[:, None] & inside_v[None, :])

    return sparse
