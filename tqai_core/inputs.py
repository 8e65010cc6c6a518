"""Whether a model is called with the inputs that the held history was computed from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Mark:
    """What is remembered of a value: no copy, and no reference that keeps it alive."""

    form: Any  # shape, dtype and device of a tensor; another value itself, where it can be compared; the type of a number
    tensor: weakref.ref[Tensor] | None = None
    version: int = 0
    number: float | None = None

    @staticmethod
    def of(value: Any, moving: bool, batch: int) -> Mark:
        """``moving``: its identity does not count; ``batch``: nor do so many of its first dimensions."""
        if isinstance(value, Tensor):
            form = (value.shape[batch:], value.dtype, value.device)
            return Mark(form) if moving else Mark(form, weakref.ref(value), 0 if value.is_inference() else value._version)
        if type(value) in (int, float):  # it may be a time
            return Mark(float, number=value)
        return Mark(value if isinstance(value, (bool, str, type(None))) else type(value))

    def is_same(self, other: Mark) -> bool:
        """Whether both are marks of one tensor with one content. A tensor that is gone is another one."""
        if self.tensor is None or other.tensor is None:
            return self.number == other.number
        return self.tensor() is other.tensor() is not None and self.version == other.version


class Inputs:
    """The inputs of each branch at its last call.

    A tensor that a host makes anew at each call (residuals of a ControlNet) is known by its form alone, since its identity tells
    nothing; one that was the same object twice must stay that object, unchanged. So it is with numbers, of which some are times.

    Args:
        moving: inputs that are another tensor at each call by their nature, as the latent.
        batched: the size of the batch counts.
    """

    def __init__(self, moving: tuple[str, ...] = (), batched: bool = True) -> None:
        self.moving, self.batch = moving, 0 if batched else 1
        self.clear()

    def clear(self) -> None:
        self._marks: dict[str, dict[str, list[Mark]]] = {}
        self._steady: set[tuple[str, str]] = set()  # branch and name of inputs that were the same objects at two calls

    def change(self, branch: str, inputs: Mapping[str, Any]) -> str | None:
        """What differs from the last call of ``branch``, in words; None for its first call, and where nothing does."""
        mark = lambda name, value: [Mark.of(leaf, name in self.moving, self.batch) for leaf in tree_flatten(value)[0]]  # noqa: E731
        now = {name: mark(name, value) for name, value in inputs.items() if value is not None}
        last, self._marks[branch] = self._marks.get(branch), now
        if last is None:
            return None
        found = [f"input {name!r} {'is new' if name in now else 'is gone'}" for name in now.keys() ^ last.keys()]
        for name in now.keys() & last.keys():
            before, after = last[name], now[name]
            same = len(before) == len(after) and all(a.is_same(b) for a, b in zip(before, after, strict=True))
            if [mark.form for mark in before] != [mark.form for mark in after]:
                found.append(f"input {name!r} has another form or value")
            elif not same and (branch, name) in self._steady:
                found.append(f"input {name!r} is another one or was changed")
            if same:
                self._steady.add((branch, name))
            else:
                self._steady.discard((branch, name))
        return ", ".join(sorted(found)) or None
