"""Block-sparse attention: each block of queries sees its own list of key blocks, the other keys through a far field.

One primitive for windows, top blocks and any mask of blocks, in whatever order the tokens lie (:mod:`attention.token_order`).
The form that gathers in plain torch is the reference of the other backends.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TqaiError
from ..workspace import Workspace
from .backends import Backend, flex, triton_sparse
from .blocks import Blocks, check
from .dense import faster
from .far_field import FAR, GROUP, FarField, far_field, padded

CHUNK = 5 << 19  # bytes of gathered keys, values and scores at a time: what a core's cache holds, and the bound of the extra memory
_FUSED: dict[tuple, bool] = {}


@torch.no_grad()
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_q: int = 256, block_k: int = 64, far: str | None = None, *,
    keys: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of ``q [b, h, n, d]`` on chosen blocks of ``k [b, h, m, d]``, ``v [b, h, m, dv]``: ``[b, h, n, dv]``.

    A query that sees no key gets zeros. A full index is dense attention. No gradient is recorded.

    Args:
        index: ``int [b or 1, h or 1, ceil(n / block_q), num_blocks]``, the key blocks of each query block; one named twice counts
            once. A bool ``[.., ceil(n / block_q), ceil(m / block_k)]`` marks them instead.
        far: what represents the other keys. None drops them. ``"centroid"``: the mean of each block, and the first order
            around it (1 + z), the same for all blocks of a head. ``"linear"``: one mean of all of them and the first order
            around it, for each block of queries. ``"clusters"``: as ``"centroid"``, but a sixth of all blocks, those next in weight,
            enter by the means of clusters of their keys, one for each four keys. The weight of all has the second order.
        keys: bool ``[b or 1, m]``; False hides a key (padding).
        backend: ``"triton"``, ``"flex"`` or ``"torch"``; None takes the first of these that runs here.

    Raises:
        TqaiError: for shapes that do not fit, a backend that cannot do it and, on CPUs, block numbers out of range (on CUDA an
            assertion on the device).
    """
    check(q, k, v, index, block_q, block_k, keys)
    if backend is not None and backend not in BACKENDS:
        raise TqaiError(f"backend={backend!r} is unknown; give None, {' or '.join(map(repr, BACKENDS))}")
    if far is not None and far not in FAR:
        raise TqaiError(f"far={far!r} is unknown; give None, {' or '.join(map(repr, FAR))}")
    if q.numel() == 0 or v.numel() == 0 or index.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    call = q, k, v, Blocks.of(q, k, index, block_q, block_k, keys), far
    if backend is not None:
        if why := BACKENDS[backend].takes(*call, asked=True):
            raise TqaiError(f"backend={backend!r} asked, but {why}: give backend='torch'")
        return BACKENDS[backend].run(*call)
    for chosen in BACKENDS.values():
        if not chosen.takes(*call):
            try:
                return chosen.run(*call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what compilers raise
                if chosen.name != "flex":
                    raise
                flex.give_up(error)
    raise AssertionError("the last backend takes every call")


def gather(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: str | None) -> Tensor:
    """Gathered keys and values, a few query blocks at a time, through torch's fused attention. A far field goes through products and a
    softmax; so does bf16 on CPUs, unless the fused attention is faster there."""
    b, h, n, d = q.shape
    m, dv, block_q = k.shape[2], v.shape[3], blocks.block_q
    nq, num_blocks = blocks.index.shape[2:]
    out, space = q.new_empty(b, h, n, dv), Workspace(q.device, q.dtype)
    group = max(GROUP // (m * d * q.element_size()), 1)  # heads at a time: some of one batch entry, or whole entries
    for i, j in itertools.product(range(0, b, max(group // h, 1)), range(0, h, min(group, h))):
        batch, heads = slice(i, i + max(group // h, 1)), slice(j, j + min(group, h))
        qs, ks, vs, flat = (x[batch, heads].flatten(0, 1) for x in (q, k, v, out))
        index, live, keys = blocks.heads(batch, heads)
        rows = len(index) * nq
        own = _Chunks(qs, ks, vs, index, live, keys, blocks, space)
        rest = far_field(qs, ks, vs, keys, blocks.unselected(batch, heads), blocks, far, space) if far else None
        done = q.new_empty(len(index), nq * block_q, dv) if n % block_q else flat
        width = num_blocks * blocks.block_k + (0 if rest is None else rest.bias.shape[2])
        limit = CHUNK if q.device.type == "cpu" else 64 * CHUNK
        step = max(limit // (q.element_size() * (width * (d + dv) + 2 * block_q * width)), 1)
        target = done.view(rows, block_q, dv)
        fused = rest is None and own.fuses(target[:step])
        for first in range(0, rows, step):
            last = min(first + step, rows)
            own.fused(first, last, target[first:last]) if fused else own.products(first, last, target[first:last], rest)
        if n % block_q:
            flat.copy_(done[:, :n])
    return out


class _Chunks:
    """The attention of a group of g heads, the query blocks i to j of all g x nq at a time."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, live: Tensor | None, keys: Tensor | None, blocks: Blocks, space: Workspace
    ):
        (g, m, d), nk, block = k.shape, blocks.nk, blocks.block_k
        self.space, self.d, self.dv, self.block_q = space, d, v.shape[2], blocks.block_q
        self.num_blocks, self.n = index.shape[2], index.shape[2] * block  # blocks and keys that a query sees
        self.k, self.v = (padded(x, block).reshape(g * nk, block * x.shape[2]) for x in (k, v))
        self.q = padded(q, self.block_q).reshape(-1, self.block_q, d)
        self.index = (index + torch.arange(g, device=k.device)[:, None, None] * nk).flatten(0, 1)  # [g nq, num_blocks]
        self.hidden: Tensor | None = None  # bool [g nq, w]: which of the last w of the n keys are hidden
        self.blind: Tensor | None = None  # bool [g nq]: no key is seen
        pad = -m % block
        if keys is not None or live is not None:
            seen = torch.ones(1, m, dtype=torch.bool, device=k.device) if keys is None else keys
            seen = F.pad(seen, (0, pad)).expand(g, -1).reshape(g * nk, block)[self.index]
            if live is not None:
                seen = seen & live.flatten(0, 1)[..., None]
            self.hidden = ~seen.flatten(1)
            self.blind = self.hidden.all(-1)
        elif pad:  # the padding of the last block, which is the last one of the rows that chose it
            self.hidden = (index[..., -1] == nk - 1).flatten()[:, None].expand(-1, pad)

    def fuses(self, out: Tensor) -> bool:
        """Whether the fused attention is to compute this. In bf16 on CPUs both are timed, once for each size, on the query blocks of
        ``out``: it is the slower one there, except on CPUs that have matrix units (AMX) for it."""
        if out.device.type != "cpu" or out.dtype != torch.bfloat16:
            return True
        asked = os.environ.get("TQAI_SPARSE", "").strip().lower()
        if asked in ("fused", "products") or torch.compiler.is_compiling():
            return asked == "fused"
        key = (len(out), self.block_q, self.n.bit_length(), self.d, self.dv, torch.get_num_threads())
        if key not in _FUSED:
            _FUSED[key] = faster(partial(self.products, 0, len(out), out, None), partial(self.fused, 0, len(out), out))
        return _FUSED[key]

    def fused(self, i: int, j: int, out: Tensor) -> None:
        """Torch's fused attention into ``out [j - i, block_q, dv]``."""
        at, mask = self.index[i:j].flatten(), None
        k, v = (x.index_select(0, at).view(j - i, 1, self.n, -1) for x in (self.k, self.v))
        if self.hidden is not None:
            mask = torch.ones(j - i, 1, 1, self.n, dtype=torch.bool, device=k.device)
            mask[..., self.n - self.hidden.shape[1] :] = ~self.hidden[i:j, None, None]
        part = F.scaled_dot_product_attention(self.q[i:j, None], k, v, attn_mask=mask)[:, 0]
        out.copy_(part if self.blind is None else part.masked_fill(self.blind[i:j, None, None], 0))

    def products(self, i: int, j: int, out: Tensor, far: FarField | None) -> None:
        """Products and a softmax into ``out [j - i, block_q, dv]``, with the far field's e pseudo-keys after the n keys."""
        c, n, e = j - i, self.n, 0 if far is None else far.bias.shape[2]
        k, v = (self.space.take(name, (c, n + e, width)) for name, width in (("k", self.d), ("v", self.dv)))
        for row, at in enumerate(self.index[i:j]):
            torch.index_select(self.k, 0, at, out=k[row, :n].view(self.num_blocks, -1))
            torch.index_select(self.v, 0, at, out=v[row, :n].view(self.num_blocks, -1))
        q = self.q[i:j] * self.d**-0.5
        if far is not None:
            far.fill(k[:, n:], v[:, n:], i, j)
        s, p = (self.space.take(name, (c, self.block_q, n + e)) for name in ("s", "p"))
        torch.bmm(q, k.mT, out=s)
        if far is not None:
            s[..., n:] += far.bias[i:j].to(s.dtype)  # of two types it would be made in a wide copy
            change = far.change(q, i, j)
            if far.mean is not None:
                s[..., n:] += (change[..., self.dv :] * q).sum(-1, keepdim=True, dtype=torch.float32).mul_(0.5).clamp_min_(0).log1p_()
        if self.hidden is not None:
            s[..., n - self.hidden.shape[1] : n].masked_fill_(self.hidden[i:j, None], -math.inf)
        torch.softmax(s, -1, out=p)
        torch.bmm(p, v, out=out)
        if far is not None:
            out.addcmul_(p[..., n + far.finer :].sum(-1, keepdim=True), change[..., : self.dv])
        if self.blind is not None:
            blind = self.blind[i:j]
            if far is not None:
                blind = blind & torch.isneginf(far.bias[i:j]).flatten(1).all(-1)
            out.masked_fill_(blind[:, None, None], 0)


BACKENDS = {  # in the order of preference
    "triton": Backend("triton", triton_sparse.takes, triton_sparse.attend),
    "flex": Backend("flex", flex.takes, flex.attend),
    "torch": Backend("torch", lambda *call, asked=False: "", gather),
}
