"""What a packed cache gives to a model that asks for its keys and values: tensors without storage.

Our own attention knows them and reads the packed rows, and so does torch's ``scaled_dot_product_attention`` that is given both of
them as they are. Anything else that computes on one gets dense values, so every model and every attention still works; it is only slower.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..kv.cache import PackedKV
from .packed import attend

# asked of a tensor without computing on it
PASSIVE = {
    "__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_complex", "element_size", "__len__", "__repr__", "get_device",
}  # fmt: skip


class Layer(Protocol):
    kv: PackedKV

    def made_dense(self) -> None: ...


class LazyKV(Tensor):
    """Keys (``which="k"``) or values (``"v"``) ``[B, H, tokens, D]`` of a layer. ``fresh``: the same tokens exactly, where the
    model computed all of them in this call."""

    layer: Layer
    which: str
    fresh: Tensor | None

    @classmethod
    def of(cls, layer: Layer, which: str, like: Tensor, length: int, fresh: Tensor | None) -> LazyKV:
        b, h, _, d = like.shape
        out = torch.Tensor._make_wrapper_subclass(cls, (b, h, length, d), dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        out.layer, out.which, out.fresh = layer, which, fresh
        return out

    @classmethod
    def pair(cls, layer: Layer, k: Tensor, v: Tensor, fresh: bool) -> tuple[LazyKV, LazyKV]:
        """All keys and values of ``layer``, after ``k`` and ``v`` were appended."""
        length = layer.kv.length
        return cls.of(layer, "k", k, length, k if fresh else None), cls.of(layer, "v", v, length, v if fresh else None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyKV({self.which}, {tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        """The values, decoded."""
        if self.fresh is not None:
            return self.fresh
        if self.layer.kv.packed:
            self.layer.made_dense()
        return self.layer.kv.dense(self.which)

    def watched(self) -> Tensor:
        """The same; keys whose queries are asked for wait for them."""
        dense = self.dense()
        if self.which == "k" and (self.layer.kv.wants_queries or not self.layer.kv.packed):
            dense = dense.as_subclass(Watched)
            dense.kv = self.layer.kv
        return dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in PASSIVE:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func is F.scaled_dot_product_attention and (out := _in_place(*args, **kwargs or {})) is not None:
            return out
        change = lambda x: x.watched() if isinstance(x, LazyKV) else x  # noqa: E731
        return func(*tree_map(change, args), **tree_map(change, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        change = lambda x: x.dense() if isinstance(x, LazyKV) else x  # noqa: E731
        return func(*tree_map(change, args), **tree_map(change, kwargs or {}))


def _in_place(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """``F.scaled_dot_product_attention`` on the packed rows; None where it is about something else than all tokens of one cache, wants a
    gradient, or has a causal mask, which torch aligns at the first key."""
    if not (isinstance(key, LazyKV) and isinstance(value, LazyKV) and not isinstance(query, LazyKV) and key.layer is value.layer):
        return None
    kv, count = key.layer.kv, query.shape[-2]
    whole = key.which == "k" and value.which == "v" and key.fresh is None and kv.packed and key.shape[2] == kv.length
    if not whole or query.ndim != 4 or dropout_p or (is_causal and count > 1) or (torch.is_grad_enabled() and query.requires_grad):
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    if attn_mask is None and count > 1:
        attn_mask = query.new_zeros(1, 1, 1, kv.length)
    if attn_mask is not None and (attn_mask.ndim != 4 or attn_mask.shape[3] != kv.length):
        return None
    kv.see(attn_mask, count)
    kv.observe(query)
    return attend(query, kv, scaling=query.shape[3] ** -0.5 if scale is None else scale, mask=attn_mask)


class Watched(Tensor):
    """Dense keys that wait for the queries and the mask they meet: an attention that is not ours never shows them otherwise. Once
    ``q`` is set it is the scores of these queries, which wait for the mask alone."""

    kv: PackedKV
    q: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = lambda x: x.as_subclass(Tensor) if isinstance(x, Watched) else x  # noqa: E731
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        own = next((x for x in flat if isinstance(x, Watched) and hasattr(x, "kv")), None)
        if func.__name__ in PASSIVE or own is None or (keys := own.kv.keys) is None:
            return out
        kv, q, (b, h, _, d) = own.kv, own.q, keys.shape
        others = [x for x in flat if not isinstance(x, Watched) and x.ndim == 4]
        if q is None:
            q = next((x for x in others if x.shape[0] == b and x.shape[1] % h == 0 and x.shape[3] == d), None)
            if q is not None and func.__name__ != "matmul":  # a whole attention
                kv.see(kwargs.get("attn_mask"), q.shape[2])
                kv.observe(q)
                return out
            going = isinstance(out, Tensor) and out.is_floating_point() and (q is not None or d in out.shape)  # a view, a repeat
        else:
            count = q.shape[2]
            mask = next((x for x in others if x.shape[3] == own.shape[-1] and x.shape[2] in (1, count)), None)
            if mask is not None or func.__name__ == "softmax":
                kv.see(
                    ~mask if mask is not None and func.__name__.startswith("masked_fill") else mask, count
                )  # before the queries, those of padding count for nothing
                kv.observe(q)
                return out
            going = isinstance(out, Tensor) and out.shape == own.shape
        if going:
            out = out.as_subclass(Watched)
            out.kv, out.q = kv, q
        return out
