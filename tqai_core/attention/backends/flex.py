"""Block-sparse attention on torch's compiled flex_attention."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..sparse import Blocks


LEAST = 16  # queries or keys a block of its kernels
_why = ""  # it does not run here, once that was found out


def wanted(q: Tensor, block_q: int, block_k: int) -> bool:
    """On CUDA, for the sizes its kernels take; on CPUs gathering is as fast and needs no compiler."""
    d = q.shape[-1]
    fits = d >= LEAST and d & (d - 1) == 0 and min(_part(block_q, 128), _part(block_k, 64)) >= LEAST
    return q.device.type == "cuda" and fits and not _why and not torch.compiler.is_compiling()


def give_up(error: Exception) -> None:
    """It did not compile on this machine: not asked again."""
    global _why
    _why = " ".join(str(error).split())[:300]
    warnings.warn(f"tqai: flex_attention does not run here ({_why}): blocks are gathered in plain torch", UserWarning, stacklevel=3)


def _part(block: int, limit: int) -> int:
    """The tile that a kernel can cut a block into."""
    return math.gcd(block, limit)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, run: Any = None) -> Tensor:
    """``run`` stands in for the compiled flex_attention (the eager one, in tests)."""
    seen = (1 - blocks.far()).bool().unflatten(0, blocks.index.shape[:2])  # [b, h, nq, nk]
    keys = blocks.keys
    if keys is not None:  # a query that sees nothing would divide by zero
        open_ = torch.nn.functional.pad(keys, (0, -keys.shape[1] % blocks.block_k)).unflatten(1, (-1, blocks.block_k)).any(-1)
        seen &= open_[:, None, None]
    options = {"BLOCK_M": _part(blocks.block_q, 128), "BLOCK_N": _part(blocks.block_k, 64)} if q.device.type == "cuda" else None
    qkv = (x.contiguous() for x in (q, k, v))
    out = (run or _compiled())(*qkv, block_mask=mask(seen, q, k, blocks), kernel_options=options)
    if keys is not None or blocks.live is not None:
        rows = seen.any(-1).repeat_interleave(blocks.block_q, 2)[..., : q.shape[2], None]
        out = out.masked_fill(~rows, 0)
    return out


def mask(seen: Tensor, q: Tensor, k: Tensor, blocks: Blocks) -> Any:
    """The BlockMask of ``seen bool [b, h, nq, nk]``. Always with a ``mask_mod``: without one, eager flex_attention sees every key and
    says nothing. Blocks without hidden keys are listed as full ones, for which the compiled kernel never asks it."""
    from torch.nn.attention.flex_attention import BlockMask

    keys, bq, bk = blocks.keys, blocks.block_q, blocks.block_k

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        listed = seen[b, h, i // bq, j // bk]
        return listed if keys is None else listed & keys[b, j]

    count = seen.sum(-1, dtype=torch.int32)
    order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    none, nowhere = torch.zeros_like(count), torch.zeros_like(order)
    some, full = (none, nowhere), (count, order)
    if keys is not None:
        some, full = full, some
    return BlockMask.from_kv_blocks(
        *some, *full, BLOCK_SIZE=(bq, bk), mask_mod=mask_mod, seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False
    )
