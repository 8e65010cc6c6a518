"""Block-sparse attention on torch's compiled flex_attention."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..blocks import Blocks

LEAST = 16  # queries or keys a block of its kernels
_why = ""  # the error of its compiler, once there was one


def takes(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: str | None, asked: bool = False) -> str:
    """Unless asked for by name, on CUDA alone: on CPUs gathering is as fast and needs no compiler."""
    d = q.shape[-1]
    if far is not None:
        return f"flex_attention has no far field (far={far!r})"
    if asked:
        return ""
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return "it is chosen on CUDA alone, outside of compiled code"
    if d < LEAST or d & (d - 1) or min(tiles(blocks)) < LEAST:
        return f"its kernels take widths that are powers of two, and blocks in tiles of {LEAST} or more"
    return _why


def give_up(error: Exception) -> None:
    """It did not compile on this machine: not asked again."""
    global _why
    _why = " ".join(str(error).split())[:300]
    warnings.warn(f"tqai: flex_attention does not run here ({_why}): blocks are gathered in plain torch", UserWarning, stacklevel=3)


def tiles(blocks: Blocks) -> tuple[int, int]:
    """Queries and keys of the tiles into which its kernels cut a block."""
    return math.gcd(blocks.block_q, 128), math.gcd(blocks.block_k, 64)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: None = None, run: Any = None) -> Tensor:
    """``run`` replaces the compiled flex_attention (by the eager one, in tests)."""
    seen, keys = (1 - blocks.unselected()).bool().unflatten(0, blocks.index.shape[:2]), blocks.keys  # [b, h, nq, nk]
    if keys is not None:  # a query that sees nothing would divide by zero
        visible = torch.nn.functional.pad(keys, (0, -keys.shape[1] % blocks.block_k)).unflatten(1, (-1, blocks.block_k)).any(-1)
        seen &= visible[:, None, None]
    options = dict(zip(("BLOCK_M", "BLOCK_N"), tiles(blocks), strict=True)) if q.device.type == "cuda" else None
    qkv = (x.contiguous() for x in (q, k, v))
    out = (run or _compiled())(*qkv, block_mask=mask(seen, q, k, blocks), kernel_options=options)
    if keys is not None or blocks.live is not None:
        rows = seen.any(-1).repeat_interleave(blocks.block_q, 2)[..., : q.shape[2], None]
        out = out.masked_fill(~rows, 0)
    return out


def mask(seen: Tensor, q: Tensor, k: Tensor, blocks: Blocks) -> Any:
    """The BlockMask of ``seen bool [b, h, nq, nk]``. Always with a ``mask_mod``: without one, eager flex_attention sees every key and
    gives no error. Blocks without hidden keys are listed as full ones: the compiled kernel does not evaluate the ``mask_mod`` there."""
    from torch.nn.attention.flex_attention import BlockMask

    keys, bq, bk = blocks.keys, blocks.block_q, blocks.block_k

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        listed = seen[b, h, i // bq, j // bk]
        return listed if keys is None else listed & keys[b, j]

    count, order = seen.sum(-1, dtype=torch.int32), (~seen).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    no_count, no_order = torch.zeros_like(count), torch.zeros_like(order)
    some, full = ((no_count, no_order), (count, order)) if keys is None else ((count, order), (no_count, no_order))
    return BlockMask.from_kv_blocks(
        *some, *full, BLOCK_SIZE=(bq, bk), mask_mod=mask_mod, seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False
    )
