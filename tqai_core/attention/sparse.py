"""Block-sparse attention: every block of queries sees its own list of key blocks, and the other keys through a far field.

One primitive for windows, top blocks and any mask of blocks, in whatever order the tokens lie (:mod:`attention.tiles` lays a
grid out tile by tile). The far field is what makes it pay: the keys that are not selected enter the same softmax as few
pseudo-keys, so that it costs a column or a hundredth of the keys, not a second pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TqaiError

FAR = ("centroid", "linear")
BACKENDS = ("torch", "flex", "triton")
CHUNK = 5 << 19  # bytes of gathered keys, values and scores at a time: what a core's cache holds, and the bound of the extra memory
SAMPLE = 512  # queries of a head whose size is looked at
GROUP = 1 << 21  # bytes of the keys of the heads that are laid out together


@torch.no_grad()
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_q: int = 256, block_k: int = 64, far: str | None = None, *,
    keys: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of ``q [b, h, n, d]`` on chosen blocks of ``k [b, h, m, d]``, ``v [b, h, m, dv]``; ``[b, h, n, dv]``.

    ``index [b or 1, h or 1, ceil(n / block_q), kept]`` names the key blocks of every query block; one named twice counts once.
    A bool ``index [.., ceil(n / block_q), ceil(m / block_k)]`` marks them instead. ``keys`` bool ``[b or 1, m]``: False hides a key
    (padding). A query that sees nothing gets zeros. A full index is dense attention. Without gradient.

    ``far`` is what becomes of the other keys: None drops them; ``"centroid"`` takes the mean of each block, and the first order
    around it, 1 + z, all blocks of a head alike; ``"linear"`` one mean of all and the first order around that, for each block of
    queries; the mass of both to the second order. ``backend`` None chooses: flex_attention (CUDA, no far field), Triton
    (``TQAI_TRITON=1``), else gathering in plain torch.

    Raises ValueError for shapes that do not fit and, on CPUs, for blocks out of range; on CUDA an assertion on the device.
    """
    check(q, k, v, index, block_q, block_k, far, keys, backend)
    if q.numel() == 0 or v.numel() == 0 or index.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    from .backends import flex, triton_sparse

    blocks = Blocks.of(q, k, index, block_q, block_k, keys)
    if backend is None:
        backend = "triton" if triton_sparse.wanted(q) else "torch"
        if backend == "torch" and far is None and flex.wanted(q, block_q, block_k):
            try:
                return flex.attend(q, k, v, blocks)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what compilers raise
                flex.give_up(error)
    if backend == "triton":
        return triton_sparse.attend(q, k, v, blocks, far)
    if backend == "flex":
        if far is not None:
            raise TqaiError(f"backend 'flex' has no far field, asked for far={far!r}: give backend='torch' or 'triton'")
        return flex.attend(q, k, v, blocks)
    return _gather(q, k, v, blocks, far)


def check(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_q: int, block_k: int, far: str | None, keys: Tensor | None, backend: str | None
) -> None:  # fmt: skip
    """What :func:`block_attention` promises to refuse."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[-1] != q.shape[-1]:
        raise TqaiError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be [b, h, tokens, d] with b, h, d alike")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise TqaiError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give three of one floating type")
    if block_q < 1 or block_k < 1:
        raise TqaiError(f"block_q={block_q}, block_k={block_k}: give numbers of tokens, 1 or more")
    if backend is not None and backend not in BACKENDS:
        raise TqaiError(f"backend={backend!r} is unknown; give None, {' or '.join(map(repr, BACKENDS))}")
    if far is not None and far not in FAR:
        raise TqaiError(f"far={far!r} is unknown; give None, {' or '.join(map(repr, FAR))}")
    (b, h, n, _), m = q.shape, k.shape[2]
    nq, nk = -(-n // block_q), -(-m // block_k)
    last = nk if index.dtype == torch.bool else "kept"
    if (
        index.ndim != 4 or index.shape[0] not in (1, b) or index.shape[1] not in (1, h) or index.shape[2] != nq
        or (index.dtype == torch.bool and index.shape[3] != nk)
    ):  # fmt: skip
        raise TqaiError(
            f"index {tuple(index.shape)}: expected [{b} or 1, {h} or 1, {nq}, {last}], key blocks of {block_k} for every {block_q} queries"
        )
    if index.is_floating_point() or index.is_complex():
        raise TqaiError(f"index is {index.dtype}: give numbers of blocks as integers, or a bool mark for each block")
    if keys is not None and (keys.dtype != torch.bool or keys.ndim != 2 or keys.shape[0] not in (1, b) or keys.shape[1] != m):
        raise TqaiError(f"keys is {keys.dtype} {tuple(keys.shape)}: expected bool [{b} or 1, {m}], True for keys that may be seen")
    if index.dtype == torch.bool or index.numel() == 0:
        return
    low, high = index.aminmax()
    if index.device.type == "cpu":
        if int(low) < 0 or int(high) >= nk:
            raise TqaiError(f"index names blocks {int(low)} to {int(high)}, there are 0 to {nk - 1} of {block_k} keys")
    else:  # asking would make the host wait
        torch._assert_async((low >= 0) & (high < nk), f"index names blocks that are not there: 0 to {nk - 1} of {block_k} keys")


@dataclass(frozen=True)
class Blocks:
    """A checked index. ``index int64 [b, h, nq, kept]`` is sorted; where ``live`` (same shape) is False the entry repeats another
    one and does not count. ``keys`` bool ``[b, m]`` or None."""

    index: Tensor
    live: Tensor | None
    keys: Tensor | None
    block_q: int
    block_k: int
    nk: int

    @staticmethod
    def of(q: Tensor, k: Tensor, index: Tensor, block_q: int, block_k: int, keys: Tensor | None) -> Blocks:
        b, h, m = q.shape[0], q.shape[1], k.shape[2]
        nk = -(-m // block_k)
        on_host = index.device.type == "cpu"
        live = None
        if index.dtype == torch.bool:
            counts = index.sum(-1, keepdim=True)
            kept = max(int(counts.max()), 1) if on_host else nk
            index = (~index).to(torch.uint8).argsort(dim=-1, stable=True)[..., :kept]
            live = torch.arange(kept, device=index.device) < counts
            if on_host and bool(live.all()):
                live = None
        else:
            index = index.long().sort(-1).values
            live = torch.ones_like(index, dtype=torch.bool)
            live[..., 1:] = index[..., 1:] != index[..., :-1]
            if on_host and bool(live.all()):
                live = None
        shape = (b, h, *index.shape[2:])
        live = None if live is None else live.expand(shape)
        return Blocks(index.expand(shape), live, None if keys is None else keys.expand(b, m), block_q, block_k, nk)

    def part(self, batch: slice, heads: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Index, live and keys of some heads, batch and heads as one dimension."""
        index, live = self.index[batch, heads], None if self.live is None else self.live[batch, heads].flatten(0, 1)
        keys = None if self.keys is None else self.keys[batch].repeat_interleave(index.shape[1], 0)
        return index.flatten(0, 1), live, keys

    def far(self, batch: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """1 where a key block is not selected, ``fp32 [batch x heads, nq, nk]``."""
        index, live, _ = self.part(batch, heads)
        marks = torch.zeros(*index.shape[:2], self.nk, device=index.device)
        ones = torch.ones_like(index, dtype=torch.float32) if live is None else live.float()
        return 1 - marks.scatter_reduce_(2, index, ones, "amax")


class Pool:
    """Memory of one call that its heads and chunks share: fresh pages cost more than the work on them."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, dict[str, Tensor]()

    def take(self, name: str, *shape: int) -> Tensor:
        count = math.prod(shape)
        have = self.held.get(name)
        if have is None or have.numel() < count:
            have = self.held[name] = self.like.new_empty(count)
        return have[:count].view(shape)


@dataclass(frozen=True)
class Field:
    """The far field of ``rows`` query blocks as pseudo-keys: ``key [rows / share, e, d]`` and ``value [rows / share, e, dv]`` enter
    the softmax with ``bias [rows, 1, e]`` (-inf: not there) added to their logits, and ``moments`` say how the value changes with
    each query.

    Centroid form, e blocks: ``moments [rows / share, d, dv]`` of keys and values around the means of their blocks, all blocks of a
    head alike; what the keys vary along a query of the head's usual size widens their mass, in ``bias``.
    Linear form, e = 1: ``moments [rows, d, dv + d]`` of far keys with far values and far keys around a common centre, from which ``mean
    [rows, 1, dv + d]`` is the way to their own means. Each query's own variance along the far keys widens their mass.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    moments: Tensor
    share: int = 1
    mean: Tensor | None = None

    def heads(self, x: Tensor, i: int, j: int) -> Tensor:
        """``x`` (key or value) of the query blocks i to j."""
        if i // self.share == (j - 1) // self.share:
            return x[i // self.share, None]
        return x[torch.arange(i, j, device=x.device) // self.share]

    def change(self, q: Tensor, i: int, j: int) -> Tensor:
        """``q [j - i, block, d]`` times their moments."""
        if self.mean is None:
            own = self.heads(self.moments, i, j)
            return torch.bmm(q, own) if len(own) > 1 else (q.flatten(0, 1) @ own[0]).view(*q.shape[:2], -1)
        mean = self.mean[i:j]
        return torch.bmm(q, self.moments[i:j]).baddbmm_(torch.bmm(q, mean[..., -q.shape[-1] :].mT), mean, alpha=-1)


def field(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, far: Tensor, block: int, form: str, pool: Pool | None = None
) -> Field:  # fmt: skip
    """The far field of the heads ``q [g, n, d]``, ``k [g, m, d]``, ``v [g, m, dv]`` for query blocks that do not see what ``far [g, nq,
    nk]`` marks. Block statistics and their products: O(m d (d + dv)); of the linear form d (d + dv) numbers for each query block."""
    pad, nk, pool = -k.shape[1] % block, far.shape[2], pool or Pool(k)
    live = torch.ones(1, k.shape[1], device=k.device, dtype=torch.bool) if keys is None else keys
    live = F.pad(live, (0, pad)).unflatten(1, (nk, block)).unsqueeze(3)  # [g or 1, nk, block, 1]
    hidden = ~live if pad or keys is not None else None
    kb, vb = (_padded(x, block).unflatten(1, (nk, block)) for x in (k, v))
    return _centroids(q, kb, vb, live, hidden, far, pool) if form == "centroid" else _linear(kb, vb, live, hidden, far, pool)


def _centroids(q: Tensor, kb: Tensor, vb: Tensor, live: Tensor, hidden: Tensor | None, far: Tensor, pool: Pool) -> Field:
    (g, nk, block, d), dv, dtype, room = kb.shape, vb.shape[3], kb.dtype, kb.shape[1] * kb.shape[2]
    count = live.sum(2).float()  # [g or 1, nk, 1]
    bias = torch.where((far > 0) & (count > 0).mT, count.log().mT, -math.inf)  # [g, nq, nk]
    key, value = ((_sum(_kept(x, hidden).flatten(0, 1)).view(g, nk, -1) / count.clamp_min(1)).to(dtype) for x in (kb, vb))
    moments, spread = pool.take("moments", g, d, dv).zero_(), far.new_zeros(g, 1, d)
    step = max(GROUP // (g * block * d * kb.element_size()), 1)
    for i in range(0, nk, step):
        j = min(i + step, nk)
        own = torch.sub(kb[:, i:j], key[:, i:j, None], out=pool.take("both", g, j - i, block, d))
        if hidden is not None:
            own.masked_fill_(hidden[:, i:j], 0)
        own = own.flatten(1, 2)
        moments.baddbmm_(own.mT, vb[:, i:j].flatten(1, 2), alpha=1 / room)  # a mean, which half precision can hold
        spread += _sum(own.square_())
    total = count.sum(1, keepdim=True).clamp_min(1)  # [g or 1, 1, 1]
    if hidden is not None:
        moments.mul_(room / total)
    few = q[:, :: -(-q.shape[1] // SAMPLE)]
    bias += ((_sum(few.square()) * spread).sum(-1, keepdim=True) / (total * few.shape[1] * 2 * d)).log1p_()
    return Field(key, value, bias.flatten(0, 1)[:, None], moments, share=far.shape[1])


def _linear(kb: Tensor, vb: Tensor, live: Tensor, hidden: Tensor | None, far: Tensor, pool: Pool) -> Field:
    (g, nk, block, d), nq, dv, dtype = kb.shape, far.shape[1], vb.shape[3], kb.dtype
    count = live.sum(2).float()
    total = count.sum(1, keepdim=True).clamp_min(1)
    # a first centre, so that the differences below keep their digits; a sum in half precision would be made in a wide copy
    even = (live.flatten(1, 2) / total).to(dtype).mT.expand(g, 1, -1)
    km, vm = (torch.bmm(even, _kept(x, hidden).flatten(1, 2)) for x in (kb, vb))  # [g, 1, d]
    n = far @ count  # [g, nq, 1]
    marks = (far / n.clamp_min(1)).to(dtype)
    moments = pool.take("moments", g, nq, d * (dv + d)).zero_()
    mean = far.new_zeros(g, nq, dv + d)
    step = max(GROUP // (g * d * (dv + d) * kb.element_size()), 1)
    for i in range(0, nk, step):
        j = min(i + step, nk)
        both = pool.take("both", g, j - i, block, dv + d)
        torch.sub(vb[:, i:j], vm[:, :, None], out=both[..., :dv])
        torch.sub(kb[:, i:j], km[:, :, None], out=both[..., dv:])
        if hidden is not None:
            both.masked_fill_(hidden[:, i:j], 0)
        rows = both.flatten(0, 1)
        own = pool.take("own", len(rows), d, dv + d)  # of each block
        torch.bmm(rows[..., dv:].mT, rows, out=own)
        mean += (far[..., i:j] / n.clamp_min(1)) @ _sum(rows).view(g, j - i, -1)
        moments.baddbmm_(marks[..., i:j], own.view(g, j - i, -1))
    mean = mean.flatten(0, 1)[:, None]
    centre = lambda c, x: (c.float().repeat_interleave(nq, 0) + x).to(dtype)  # noqa: E731
    return Field(
        centre(km, mean[..., dv:]), centre(vm, mean[..., :dv]), n.log().flatten(0, 1)[:, None], moments.view(g * nq, d, dv + d),
        mean=mean.to(dtype),
    )  # fmt: skip


def _kept(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x if hidden is None else x.masked_fill(hidden, 0)


def _gather(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, far: str | None) -> Tensor:
    """Gathered keys and values, a few query blocks at a time. Half precision on CPUs goes through products and a softmax, which is three
    times as fast there as the fused attention; the rest through the fused one."""
    b, h, n, d = q.shape
    m, dv, bq, bk = k.shape[2], v.shape[3], blocks.block_q, blocks.block_k
    nq, kept = blocks.index.shape[2:]
    out, pool = q.new_empty(b, h, n, dv), Pool(q)
    fused = far is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16)
    for batch, heads in _spans(b, h, max(GROUP // (m * d * q.element_size()), 1)):
        qs, ks, vs, flat = (x[batch, heads].flatten(0, 1) for x in (q, k, v, out))
        index, live, keys = blocks.part(batch, heads)
        size = len(index)
        own = _Chunks(qs, ks, vs, index, live, keys, bq, bk, pool)
        theirs = field(qs, ks, vs, keys, blocks.far(batch, heads), bk, far, pool) if far else None
        done = q.new_empty(size, nq * bq, dv) if n % bq else flat
        target = done.view(size * nq, bq, dv)
        width = kept * bk + (0 if theirs is None else theirs.key.shape[1])
        limit = CHUNK if q.device.type == "cpu" else 64 * CHUNK
        step = max(limit // (q.element_size() * (width * (d + dv) + 2 * bq * width)), 1)
        run = own.fused if fused else own.products
        for i in range(0, size * nq, step):
            run(i, min(i + step, size * nq), target, theirs)
        if n % bq:
            flat.copy_(done[:, :n])
    return out


def _sum(x: Tensor) -> Tensor:
    """``[g, m, d] -> fp32 [g, 1, d]``, as a product: a sum of half precision would be made in a wide copy, or overflow."""
    unit = 0.5 ** (x.shape[1] - 1).bit_length()
    return torch.bmm(x.new_full((1, 1, 1), unit).expand(len(x), 1, x.shape[1]), x).float() / unit


def _padded(x: Tensor, block: int) -> Tensor:
    """``[g, m, d]`` with zeros up to whole blocks; no copy where there are none."""
    pad = -x.shape[1] % block
    return F.pad(x, (0, 0, 0, pad)) if pad else x


def _spans(b: int, h: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Batch and heads of about ``group`` heads at a time: parts of one batch entry, or whole ones."""
    if group >= h:
        yield from ((slice(i, i + group // h), slice(0, h)) for i in range(0, b, group // h))
    else:
        yield from ((slice(i, i + 1), slice(j, j + group)) for i in range(b) for j in range(0, h, group))


class _Chunks:
    """The attention of a group of heads, some query blocks at a time."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, live: Tensor | None, keys: Tensor | None, bq: int, bk: int, pool: Pool
    ):
        g, m, d = k.shape
        self.pool = pool
        nk, kept = -(-m // bk), index.shape[2]
        self.d, self.dv, self.bq, self.kept, self.bk, self.scale = d, v.shape[2], bq, kept, bk, d**-0.5
        rows = lambda x, block: _padded(x, block).reshape(-1, block * x.shape[2])  # noqa: E731
        self.k, self.v, self.q = rows(k, bk), rows(v, bk), rows(q, bq).view(-1, bq, d)
        self.index = (index + torch.arange(g, device=k.device)[:, None, None] * nk).flatten(0, 1)  # [g nq, kept]
        self.tail = None  # the padding of the last block, which is the last one of those that chose it
        self.seen = None  # bool [g nq, kept bk] where more than that is hidden
        pad = -m % bk
        if keys is not None or live is not None:
            seen = torch.ones(1, m, dtype=torch.bool, device=k.device) if keys is None else keys
            seen = F.pad(seen, (0, pad)).view(-1, bk).expand(g * nk if keys is not None else nk, bk)
            at = self.index if keys is not None else index.flatten(0, 1)
            self.seen = seen[at]
            if live is not None:
                self.seen = self.seen & live.flatten(0, 1)[..., None]
            self.seen = self.seen.flatten(1)
        elif pad:
            self.tail = (index[..., -1] == nk - 1).flatten()[:, None, None], bk - pad

    def fused(self, i: int, j: int, out: Tensor, _: Field | None) -> None:
        c, at = j - i, self.index[i:j].flatten()
        k = self.k.index_select(0, at).view(c, 1, self.kept * self.bk, self.d)
        v = self.v.index_select(0, at).view(c, 1, self.kept * self.bk, self.dv)
        mask = None
        if self.seen is not None:
            mask = self.seen[i:j, None, None]
        elif self.tail is not None:
            hides, inside = self.tail
            mask = torch.ones(c, 1, 1, self.kept * self.bk, dtype=torch.bool, device=k.device)
            mask[..., (self.kept - 1) * self.bk + inside :] = ~hides[i:j, None]
        part = F.scaled_dot_product_attention(self.q[i:j, None], k, v, attn_mask=mask)[:, 0]
        if self.seen is not None:
            part = part.masked_fill(~self.seen[i:j].any(-1)[:, None, None], 0)
        out[i:j] = part

    def products(self, i: int, j: int, out: Tensor, far: Field | None) -> None:
        c, n = j - i, self.kept * self.bk
        e = 0 if far is None else far.key.shape[1]
        k, v = self.pool.take("k", c, n + e, self.d), self.pool.take("v", c, n + e, self.dv)
        for row, at in enumerate(self.index[i:j]):
            torch.index_select(self.k, 0, at, out=k[row, :n].view(self.kept, -1))
            torch.index_select(self.v, 0, at, out=v[row, :n].view(self.kept, -1))
        q = self.q[i:j] * self.scale
        if far is not None:
            k[:, n:], v[:, n:] = far.heads(far.key, i, j), far.heads(far.value, i, j)
        s, p = self.pool.take("s", c, self.bq, n + e), self.pool.take("p", c, self.bq, n + e)
        torch.bmm(q, k.mT, out=s)
        if far is not None:
            s[..., n:] += far.bias[i:j]
            change = far.change(q, i, j)
            if far.mean is not None:
                s[..., n:] += (change[..., self.dv :] * q).sum(-1, keepdim=True, dtype=torch.float32).mul_(0.5).clamp_min_(0).log1p_()
        if self.seen is not None:
            s[..., :n].masked_fill_(~self.seen[i:j, None], -math.inf)
        elif self.tail is not None:
            hides, inside = self.tail
            s[..., n - self.bk + inside : n].masked_fill_(hides[i:j], -math.inf)
        torch.softmax(s, -1, out=p)
        o = out[i:j]
        torch.bmm(p, v, out=o)
        if far is not None:
            o.addcmul_(p[..., n:].sum(-1, keepdim=True), change[..., : self.dv])
        if self.seen is not None:
            dead = ~self.seen[i:j].any(-1)
            if far is not None:
                dead = dead & torch.isneginf(far.bias[i:j]).flatten(1).all(-1)
            o.masked_fill_(dead[:, None, None], 0)
