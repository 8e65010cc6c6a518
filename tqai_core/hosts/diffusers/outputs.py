"""What a denoiser returns, taken apart into the tensors that are forecast, and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

DEEPEST = 2  # an output object or tuple, and a list of pictures in it; what lies deeper is a cache


@dataclass(frozen=True)
class Form:
    """The form of an output: lists and tuples of slots, and the auxiliary parts, such as a cache that is handed back.

    A velocity is a tensor of floats in the output object, tuple or list, or in a list of pictures inside it. Everything else is
    auxiliary: it is passed on as the last computed call of the branch returned it. A list of pictures of one size is one tensor, as a
    batch is.
    """

    parts: Any

    @staticmethod
    def of(output: Any) -> tuple[Form, list[Tensor]]:
        """The form, and the tensors that fill its slots, in order."""
        tensors: list[Tensor] = []
        return Form(_taken(output, tensors, 0)), tensors

    def filled(self, tensors: list[Tensor]) -> Any:
        return _filled(self.parts, iter(tensors))


@dataclass(frozen=True)
class _Slot:
    pass


@dataclass(frozen=True)
class _Pictures:
    pass


@dataclass(frozen=True)
class _Group:
    kind: type
    parts: dict[Any, Any]


def _taken(value: Any, tensors: list[Tensor], depth: int) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        tensors.append(value)
        return _Slot()
    if depth < DEEPEST and isinstance(value, BaseOutput):
        return _Group(type(value), {name: _taken(part, tensors, depth + 1) for name, part in value.items()})
    if depth < DEEPEST and type(value) is list and _alike(value):
        tensors.append(torch.stack(value))
        return _Pictures()
    if depth < DEEPEST and type(value) in (list, tuple):
        return _Group(type(value), {i: _taken(part, tensors, depth + 1) for i, part in enumerate(value)})
    return value


def _alike(values: list[Any]) -> bool:
    """Whether these are two tensors of floats or more, of one shape and dtype."""
    kinds = {(x.shape, x.dtype, x.device) if isinstance(x, Tensor) and x.is_floating_point() else None for x in values}
    return len(values) > 1 and len(kinds) == 1 and None not in kinds


def _filled(part: Any, tensors: Any) -> Any:
    if isinstance(part, _Slot):
        return next(tensors)
    if isinstance(part, _Pictures):
        return list(next(tensors).unbind())
    if isinstance(part, _Group):
        parts = {name: _filled(inner, tensors) for name, inner in part.parts.items()}
        return part.kind(**parts) if issubclass(part.kind, BaseOutput) else part.kind(parts.values())
    return part
