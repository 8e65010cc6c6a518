"""What a denoiser returns, taken apart into the tensors that are forecast, and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

DEEPEST = 2  # an output object or tuple, and a list of pictures in it; what lies deeper is a cache


@dataclass(frozen=True)
class Form:
    """The form of an output: lists and tuples of slots, and the auxiliary parts, such as a cache that is handed back.

    A velocity is a tensor of floats in the output object, tuple or list, or in a list of pictures inside it. Everything else is
    auxiliary: it is passed on as the last computed call of the branch returned it.
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
class _Group:
    kind: type
    parts: dict[Any, Any]


def _taken(value: Any, tensors: list[Tensor], depth: int) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        tensors.append(value)
        return _Slot()
    if depth < DEEPEST and isinstance(value, BaseOutput):
        return _Group(type(value), {name: _taken(part, tensors, depth + 1) for name, part in value.items()})
    if depth < DEEPEST and type(value) in (list, tuple):
        return _Group(type(value), {i: _taken(part, tensors, depth + 1) for i, part in enumerate(value)})
    return value


def _filled(part: Any, tensors: Any) -> Any:
    if isinstance(part, _Slot):
        return next(tensors)
    if isinstance(part, _Group):
        parts = {name: _filled(inner, tensors) for name, inner in part.parts.items()}
        return part.kind(**parts) if issubclass(part.kind, BaseOutput) else part.kind(parts.values())
    return part
