"""The layer caches of diffusers, packed: the tensors that each class holds become :class:`~tqai_core.kv.prefix.Prefix`.

A layer cache that a pipeline or a transformer has made is turned into a packed one where it lies: its class becomes a subclass of its
own class. So whoever holds it has the packed one, nothing global is patched, and :meth:`Packed.unpack` makes it what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...attention.lazy_prefix import lazy
from ...kv.inputs import Inputs
from ...kv.prefix import Prefix
from ...kv.segments import Plan

Pair = tuple[Tensor, Tensor]


@dataclass
class Slots:
    """What one packed layer cache holds: in each slot the runs of tokens that were stored in it.

    Attributes:
        plan: how prefixes are packed; of a history the last tokens stay exact too.
        heads: of the layer, for caches that keep heads and dimensions as one.
        interleaved: whether rotary positions turn channels (2i, 2i + 1).
        host: whether packed rows lie in host memory.
        queries: gives the energy of the queries seen in this pass, and forgets it.
        changed: called with these slots after each change.
        inputs: gives the inputs of the layer, from which these keys and values come, packed; None where rows of them are to be held.
        in_place: whether this call's attention may get tensors without storage.
    """

    plan: Plan
    heads: int
    interleaved: bool
    host: bool
    queries: Callable[[], Tensor | None]
    changed: Callable[[Slots], None]
    row: dict[str, Any]  # of the report
    inputs: Callable[[Tensor, Tensor], Inputs | None] = lambda k, v: None
    in_place: Callable[[], bool] = lambda: False
    runs: dict[str, list[Prefix | Inputs]] = field(default_factory=dict)
    held: int = 0  # bytes, walked at the last change
    error: Tensor | None = None  # NMSE of keys and of values at the worst store
    flat: bool = False  # whether heads and dimensions come as one

    def put(self, slot: str, k: Tensor, v: Tensor, *, append: bool = False, history: bool = False) -> None:
        """Keys and values ``[B, n, H, D]`` or ``[B, n, H D]`` in place of what a slot holds, or as its next run. ``history``: the
        slot is stored again and again, with what it had in front."""
        self.flat = k.ndim == 3
        if self.flat:
            k, v = k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        before = self.runs.get(slot, [])
        queries = self.queries()
        if queries is not None and queries.shape != (k.shape[0], k.shape[2], 1, k.shape[3]):
            queries = None
        new: Prefix | Inputs | None = None if history else self.inputs(k, v)
        if new is None:
            known = before[0] if history and before and isinstance(before[0], Prefix) else None
            plan = self.plan if history else replace(self.plan, recent=0)
            new = Prefix.pack(k, v, plan, queries, self.interleaved, known, self.host)
        self.runs[slot] = [*before, new] if append else [new]
        if new.error is not None:
            self.error = new.error if self.error is None else torch.maximum(self.error, new.error)
        self._change()

    def get(self, slot: str) -> Pair | None:
        """All tokens of a slot, dense; None where it has none."""
        runs = self.runs.get(slot, [])
        if not runs:
            return None
        if any(run.packed for run in runs):
            self._decoded()
        k, v = runs[0].dense() if len(runs) == 1 else (torch.cat(part, 1) for part in zip(*(run.dense() for run in runs), strict=True))
        return (k.flatten(2), v.flatten(2)) if self.flat else (k, v)

    def read(self, slot: str) -> Pair | None:
        """The same, for an attention that may read the packed rows where they lie."""
        runs = self.runs.get(slot, [])
        if not any(run.packed for run in runs) or self.flat or runs[0].device.type != "cpu" or not self.in_place():
            return self.get(slot)  # kernels of other devices take pointers, which a tensor without storage has not
        return lazy(runs, self._decoded)

    def _decoded(self) -> None:
        self.row["materialised"] += 1

    def clear(self) -> None:
        self.runs.clear()
        self._change()

    def prefixes(self) -> list[Prefix | Inputs]:
        return [run for runs in self.runs.values() for run in runs]

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.prefixes())

    def _change(self) -> None:
        self.held = self.nbytes
        self.changed(self)


class Packed:
    """What the packed layer caches share. ``plain`` is the class of diffusers that one stands in for; its own fields stay empty."""

    plain: Any
    slots: Slots

    def absorb(self) -> None:
        """What the plain fields hold goes into the slots."""
        raise NotImplementedError

    def expose(self) -> None:
        """What the slots hold goes into the plain fields, decoded."""
        raise NotImplementedError

    def clear(self) -> None:
        self.slots.clear()

    def unpack(self) -> None:
        """The layer as diffusers made it."""
        self.expose()
        vars(self).pop("slots")
        self.__class__ = self.plain


class Whole(Packed):
    """One store of all tokens, read at every later step (QwenImage21, Flux2, WanAnimate2)."""

    @torch.compiler.disable
    def store(self, k: Tensor, v: Tensor) -> None:
        self.slots.put("all", k, v)

    @torch.compiler.disable
    def get(self) -> Pair:
        return self.slots.read("all") or self.plain.get(self)  # which raises its own error

    def absorb(self) -> None:
        try:
            k, v = self.plain.get(self)
        except RuntimeError:  # nothing is stored yet
            return
        self.plain.store(self, None, None)
        self.store(k, v)

    def expose(self) -> None:
        if found := self.slots.get("all"):
            self.plain.store(self, *found)


class Appended(Packed):
    """The pictures of each sample one after the other; ``get`` puts them before the tokens of the call (GLM-Image)."""

    k_caches: list[Tensor]
    v_caches: list[Tensor]
    current_sample_idx: int

    @torch.compiler.disable
    def store(self, k: Tensor, v: Tensor) -> None:
        self.slots.put(str(min(self.current_sample_idx, len(self.slots.runs))), k, v, append=True)

    @torch.compiler.disable
    def get(self, k: Tensor, v: Tensor) -> Pair:
        self.expose()
        try:
            return self.plain.get(self, k, v)  # type: ignore[no-any-return]
        finally:
            self.k_caches, self.v_caches = [], []

    def clear(self) -> None:
        super().clear()
        self.plain.clear(self)

    def absorb(self) -> None:
        held, self.k_caches, self.v_caches = list(zip(self.k_caches, self.v_caches, strict=True)), [], []
        for i, (k, v) in enumerate(held):
            self.slots.put(str(i), k, v)

    def expose(self) -> None:
        found = [pair for slot in self.slots.runs if (pair := self.slots.get(slot))]
        self.k_caches, self.v_caches = [k for k, _ in found], [v for _, v in found]


class Window(Packed):
    """Sinks before their rotary positions, and a history of frames that grows and is cut (the refiner of Sana WM). What a pass has
    captured stays as it is: the pipeline takes it at once."""

    @torch.compiler.disable
    def store_sink(self, k: Tensor, v: Tensor) -> None:
        self.slots.put("sink", k, v)

    @torch.compiler.disable
    def get_sink(self) -> Pair | None:
        return _some(self.slots.get("sink"))

    @torch.compiler.disable
    def store_history(self, k: Tensor, v: Tensor) -> None:
        self.slots.put("history", k, v, history=True)

    @torch.compiler.disable
    def get_history(self) -> Pair | None:
        return _some(self.slots.get("history"))

    def clear(self) -> None:
        super().clear()
        self.plain.clear(self)

    def absorb(self) -> None:
        for name in ("sink", "history"):
            if found := getattr(self.plain, f"get_{name}")(self):
                getattr(self.plain, f"store_{name}")(self, None, None)
                getattr(self, f"store_{name}")(*found)

    def expose(self) -> None:
        for name in ("sink", "history"):
            if found := self.slots.get(name):
                getattr(self.plain, f"store_{name}")(self, *found)


def _some(pair: Pair | None) -> Pair | None:
    return pair if pair is not None and pair[0].shape[1] else None


_CLASSES: dict[type, Any] = {}


def adopt(layer: Any, stand_in: type[Packed], slots: Slots) -> None:
    """Make ``layer`` a packed one; what it holds already is packed."""
    plain = type(layer)
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Packed{plain.__name__}", (stand_in, plain), {"plain": plain, "__module__": __name__})
    layer.__class__ = _CLASSES[plain]
    layer.slots = slots
    layer.absorb()
