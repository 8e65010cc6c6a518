"""What a packed cache of a diffusion transformer gives for its keys and values: tensors without storage.

They may be joined with other tokens and attended to, which reads the packed rows in place (:mod:`attention.prefix`). Anything else
that computes on one gets dense values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .lazy import PASSIVE
from .prefix import Part, Run, attend


class Decoded:
    """The runs of one layer for one call: keys and values are decoded together, if anybody asks for either."""

    def __init__(self, runs: Sequence[Run], made_dense: Callable[[], None]) -> None:
        self.runs, self.made_dense = tuple(runs), made_dense
        self._left: dict[str, Tensor] = {}

    def dense(self, which: str) -> Tensor:
        """``k`` or ``v``, ``[B, n, H, D]``; the other one waits."""
        if which not in self._left:
            self.made_dense()
            k, v = zip(*(run.dense() for run in self.runs), strict=True)
            self._left = {"k": _joined(k), "v": _joined(v)}
        return self._left.pop(which)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


class PrefixKV(Tensor):
    """Keys (``which="k"``) or values (``"v"``) of packed runs and of tensors around them, ``[B, n, H, D]`` or, ``swapped``,
    ``[B, H, n, D]``: a tensor without storage. It can be joined with other tokens and attended to; anything else makes it dense."""

    which: str
    parts: tuple[Tensor | Decoded, ...]
    unswapped: tuple[int, ...]  # the shape without it
    swapped: bool

    @staticmethod
    def __new__(cls, which: str, parts: tuple[Tensor | Decoded, ...], shape: Sequence[int], like: Any, swapped: bool = False) -> PrefixKV:
        size = [shape[0], shape[2], shape[1], shape[3]] if swapped else list(shape)
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]

    def __init__(self, which: str, parts: tuple[Tensor | Decoded, ...], shape: Sequence[int], like: Any, swapped: bool = False) -> None:
        self.which, self.parts, self.unswapped, self.swapped = which, parts, tuple(shape), swapped

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PrefixKV({self.which}, {tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        out = _joined([part if isinstance(part, Tensor) else part.dense(self.which) for part in self.parts])
        return out.transpose(1, 2) if self.swapped else out

    def flat(self) -> list[Part]:
        return [own for part in self.parts for own in ([part] if isinstance(part, Tensor) else part.runs)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in PASSIVE:
            return super().__torch_function__(func, types, args, kwargs)
        known: Any = {"cat": _cat, "permute": _permute, "scaled_dot_product_attention": _attention}.get(func.__name__)
        if known is not None and (out := known(*args, **kwargs)) is not None:
            return out
        change = lambda x: x.dense() if isinstance(x, PrefixKV) else x  # noqa: E731
        return func(*tree_map(change, args), **tree_map(change, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        change = lambda x: x.dense() if isinstance(x, PrefixKV) else x  # noqa: E731
        return func(*tree_map(change, args), **tree_map(change, kwargs or {}))


def lazy(runs: Sequence[Run], made_dense: Callable[[], None]) -> tuple[PrefixKV, PrefixKV]:
    """Keys and values of some runs; ``made_dense`` is called where they are decoded after all."""
    source = Decoded(runs, made_dense)
    shapes = [[run.shapes[i] for run in runs] for i in (0, 1)]
    like = runs[0]
    k, v = (
        PrefixKV(which, (source,), (own[0][0], sum(x[1] for x in own), *own[0][2:]), like) for which, own in zip("kv", shapes, strict=True)
    )
    return k, v


def _cat(tensors: Any, dim: int = 0, **more: Any) -> Tensor | None:
    first = next(x for x in tensors if isinstance(x, PrefixKV))
    if dim != 1 or more or any(x.ndim != 4 or x.dtype != first.dtype or getattr(x, "swapped", False) for x in tensors):
        return None
    parts = [
        part for x in tensors for part in (x.parts if isinstance(x, PrefixKV) else (x,)) if not isinstance(part, Tensor) or part.shape[1]
    ]
    shape = (first.shape[0], sum(x.shape[1] for x in tensors), *first.shape[2:])
    return PrefixKV(first.which, tuple(parts), shape, first)


def _permute(x: PrefixKV, *dims: Any) -> Tensor | None:
    order = dims[0] if len(dims) == 1 else dims
    return PrefixKV(x.which, x.parts, x.unswapped, x, not x.swapped) if tuple(order) == (0, 2, 1, 3) else None


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    own = isinstance(key, PrefixKV) and isinstance(value, PrefixKV) and not isinstance(query, PrefixKV)
    if not own or not (key.swapped and value.swapped) or attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return None
    if query.device.type != "cpu" or query.shape[:2] != key.shape[:2] or key.shape[3] != value.shape[3]:
        return None
    keys, values = key.flat(), value.flat()
    same = len(keys) == len(values) and all(isinstance(k, Tensor) == isinstance(v, Tensor) for k, v in zip(keys, values, strict=True))
    exact = [query, *(part for part in (*keys, *values) if isinstance(part, Tensor))]
    if not same or (torch.is_grad_enabled() and any(x.requires_grad for x in exact)):
        return None
    return attend(query, keys, values, scale)
