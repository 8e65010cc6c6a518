"""The packed attention of a few queries as a Triton kernel: the algorithm of ``packed.c`` for GPUs.

Split K: each program takes one kv head and a block of tokens, looks the levels up, and leaves its own maximum, weight and
weighted sum; torch joins them. Checked with Triton's interpreter (``TRITON_INTERPRET=1``), not timed on a GPU, and so
asked for: ``TQAI_TRITON=1``. Without Triton or on another device the torch path runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...codecs.rows import Rows
from ...kv.segments import UNCHANGED, Adjustment, BitTier
from .. import eager
from ..call import Call, OnlineSoftmax
from . import triton_sparse

BLOCK = 128  # tokens of a program
ROWS = 64  # queries of one kv head, group included


def takes(call: Call, tier: BitTier, change: Adjustment) -> str:
    """Why the kernel is not for ``call``, or ""."""
    if not tier.segments or change is not UNCHANGED or not isinstance(tier.coder_v, Rows):
        return "it is for plain rows that are all read"
    if not {tier.coder_k.bits, tier.coder_v.bits} <= {2, 3, 4, 8} or call.q.shape[2] > ROWS:
        return f"it is for 2, 3, 4 and 8 bits and at most {ROWS} queries of a kv head"
    return "" if triton_sparse.wanted(call.q) else "TQAI_TRITON=1 is not set, or Triton has no such device"


def run(call: Call, tier: BitTier, change: Adjustment) -> OnlineSoftmax:
    """The softmax over the rows of ``tier``; the exact ones by torch."""
    state = eager.exact_rows(call, tier)
    state.sum = tier.coder_v.rotate(state.sum)
    state.merge(*block_states(call, tier))
    state.sum = tier.coder_v.unrotate(state.sum)
    return state


def block_states(call: Call, tier: BitTier) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax state of each block of packed rows: maximum and weight ``[parts, B, H, rows, 1]``, sum ``[parts, B, H, rows, Dv]``."""
    import triton

    q, shift = eager.rotated(call.q, tier)
    keys, values, mask = tier.coder_k, tier.coder_v, call.mask.at(0, tier.length)
    b, h, r, d = q.shape
    q = q.contiguous()
    added, strides = q, (0, 0, 0)
    if mask is not None:
        added = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else mask.float()
        strides = tuple(0 if size == 1 else step for size, step in zip(added.shape[:3], added.stride()[:3], strict=True))  # type: ignore[assignment]
        added = added if added.stride(-1) == 1 else added.contiguous()
    blocks = [-(-len(segment) // BLOCK) for segment in tier.segments]
    parts, at, done = sum(blocks), tier.sinks, 0
    tops = q.new_empty(b * h, parts, r)
    weights, sums = torch.empty_like(tops), q.new_empty(b * h, parts, r, values.d)
    kernel: Any = _kernel()
    for segment, count in zip(tier.segments, blocks, strict=True):
        kernel[(b * h, count)](
            segment.codes_k.contiguous(), segment.gain_k.contiguous().view(torch.int16),
            segment.codes_v.contiguous(), segment.gain_v.contiguous().view(torch.int16),
            keys.level, values.runs[0].level, q, q if shift is None else shift.contiguous(), added, tops, weights, sums,
            len(segment), h, r, call.count, call.group, d, values.d, parts, done, at, *strides, call.softcap or 1.0,
            BITS_K=keys.bits, BITS_V=values.runs[0].bits, SHIFT=shift is not None, MASK=mask is not None, CAP=bool(call.softcap),
            BLOCK=BLOCK, ROWS=max(triton.next_power_of_2(r), 16),
            UNITS_K=max(triton.next_power_of_2(d // _parts(keys.bits)), 16),
            UNITS_V=max(triton.next_power_of_2(values.d // _parts(values.runs[0].bits)), 16),
        )  # fmt: skip
        at, done = at + len(segment), done + count
    tops, weights, sums = (rearrange(x, "(b h) parts r ... -> parts b h r ...", b=b) for x in (tops[..., None], weights[..., None], sums))
    return tops, weights, sums


def _parts(bits: int) -> int:
    """Codes that begin in one byte; a program takes the coordinates part, part + parts, part + 2 parts, ... together."""
    return {2: 4, 3: 4, 4: 2, 8: 1}[bits]


@cache
def _kernel() -> Any:
    """Triton is imported at the first use, not before."""
    import triton
    import triton.language as tl

    globals()["tl"] = tl  # where the kernels look their names up

    @triton.jit
    def levels(codes, row_bytes, level, rows, seen, d, part: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Levels ``[tokens, units]`` of coordinates ``parts x unit + part``."""
        PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
        unit = tl.arange(0, UNITS)
        inside = seen[:, None] & (unit < d // PARTS)[None, :]
        start = codes + rows[:, None].to(tl.int64) * row_bytes
        code = tl.load(start + unit[None, :], mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            return tl.where(inside, code.to(tl.float32) - 127.5, 0.0)
        if BITS == 4:
            code = (code >> (4 * part)) & 15
        else:
            code = (code >> (2 * part)) & 3
            if BITS == 3:
                high = tl.load(start + d // 4 + unit[None, :] // 2, mask=inside, other=0).to(tl.int32)
                code += ((high >> (4 * (unit[None, :] & 1) + part)) & 1) * 4
        return tl.load(level + code, mask=inside, other=0.0)

    @triton.jit
    def gains(gain, rows, seen):  # type: ignore[no-untyped-def]
        bits = tl.load(gain + rows, mask=seen, other=0).to(tl.int32)
        return (bits << 16).to(tl.float32, bitcast=True)  # bf16

    globals().update(levels=levels, gains=gains)

    @triton.jit
    def packed(  # type: ignore[no-untyped-def]
        codes_k, gain_k, codes_v, gain_v, level_k, level_v, q, shift, mask, tops, weights, sums,
        tokens, kv_heads, rows, count, group, d, dv, parts, done, column, mask_batch, mask_head, mask_row, softcap,
        BITS_K: tl.constexpr, BITS_V: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr, UNITS_K: tl.constexpr, UNITS_V: tl.constexpr,
    ):  # fmt: skip
        PARTS_K: tl.constexpr = 1 if BITS_K == 8 else (2 if BITS_K == 4 else 4)
        PARTS_V: tl.constexpr = 1 if BITS_V == 8 else (2 if BITS_V == 4 else 4)
        head, block = tl.program_id(0), tl.program_id(1)
        token = block * BLOCK + tl.arange(0, BLOCK)
        seen = token < tokens
        at = head * tokens + token
        row = tl.arange(0, ROWS)
        real = row < rows
        s = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        unit = tl.arange(0, UNITS_K)
        for part in tl.static_range(PARTS_K):
            place = (head * rows + row[:, None]) * d + unit[None, :] * PARTS_K + part
            own = tl.load(q + place, mask=real[:, None] & (unit < d // PARTS_K)[None, :], other=0.0)
            k = levels(codes_k, d * BITS_K // 8, level_k, at, seen, d, part, BITS_K, UNITS_K)
            s += tl.dot(own, tl.trans(k), input_precision="ieee")
        s *= gains(gain_k, at, seen)[None, :]
        if SHIFT:
            s += tl.load(shift + head * rows + row, mask=real, other=0.0)[:, None]
        if CAP:
            s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))  # tanh
        if MASK:
            query_head = head % kv_heads * group + row // count
            place = (head // kv_heads) * mask_batch + query_head * mask_head + row % count * mask_row
            s += tl.load(mask + place[:, None] + column + token[None, :], mask=real[:, None] & seen[None, :], other=0.0)
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(tl.max(s, 1), -1e30)  # finite: a block that may see nothing weighs nothing
        p = tl.exp(s - top[:, None])
        place = (head * parts + done + block) * rows + row
        tl.store(tops + place, top, mask=real)
        tl.store(weights + place, tl.sum(p, 1), mask=real)
        p *= gains(gain_v, at, seen)[None, :]
        unit = tl.arange(0, UNITS_V)
        for part in tl.static_range(PARTS_V):
            v = levels(codes_v, dv * BITS_V // 8, level_v, at, seen, dv, part, BITS_V, UNITS_V)
            inside = real[:, None] & (unit < dv // PARTS_V)[None, :]
            tl.store(sums + place[:, None] * dv + unit[None, :] * PARTS_V + part, tl.dot(p, v, input_precision="ieee"), mask=inside)

    return packed
