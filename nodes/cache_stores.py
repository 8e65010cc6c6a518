"""Packed caches in place of the ones that ComfyUI's cache nodes make, with the same interface. Knows no host.

* ``PoseBranchCache`` (nodes WanAnimate2Cache and QwenImage21Cache): a subclass of the host's class. It holds the input of each block, or
  keys and values one after the other.
* the dictionary of ``FluxKVCache``: keys and values of the reference pictures, for each condition apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tqai_core.kv.activations import Activations
from tqai_core.kv.prefix import Prefix, energy

from .cache_run import CacheRun, Packed

SINKS = 4  # first tokens of a text, which many queries look at: exact


class PackedSlots:
    """What a packed ``PoseBranchCache`` does in its own way; the rest (one slot for each sequence, the choice of it) is the host's."""

    run: CacheRun
    store_device: torch.device
    slots: list[dict[str, Any]]
    slot: dict[str, Any] | None
    passing: dict[int, Tensor]  # keys and values of this forward, until they are taken

    def select(self, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.passing = {}
        if self.run.full:
            self.drop()
            return False
        return super().select(k, *args, **kwargs)  # type: ignore[misc]

    @torch.compiler.disable
    def put(self, i: int, t: Tensor) -> None:
        """``t [B, n, channels]`` a block's input, or ``[B, 2, n, heads, d]`` keys and values, which are taken again in this forward."""
        if t.ndim == 5:
            self.passing[i] = t
        if self.slot is None:
            return
        host = self.run.host or (self.store_device.type == "cpu" and t.device.type != "cpu")
        with self.run.lock:
            part: Packed
            if t.ndim == 5:
                part = Prefix.pack(t[:, 0], t[:, 1], self.run.settings.plan(SINKS), host=host)
            else:
                part = Activations.pack(t[:1], self.run.settings.bits_v, host=host)
            self.slot["blocks"][i] = part
            self.run.kept(part)

    def prefetch(self, i: int, device: torch.device, dtype: torch.dtype) -> None:
        """Packed rows visit the device a segment at a time while they are decoded."""

    @torch.compiler.disable
    def take(self, i: int, device: torch.device, dtype: torch.dtype, batch_size: int) -> Tensor:
        t = self.passing.pop(i, None)
        if t is None:
            assert self.slot is not None
            part = self.slot["blocks"][i]
            t = part.dense() if isinstance(part, Activations) else torch.stack(part.dense(), 1)
        t = t.to(device, dtype)
        return t if t.shape[0] == batch_size else t.repeat(-(-batch_size // t.shape[0]), *[1] * (t.ndim - 1))[:batch_size]

    def layers(self) -> Iterator[tuple[str, Packed]]:
        yield from ((f"block.{i}", part) for slot in self.slots for i, part in slot["blocks"].items())

    def offload(self) -> None:
        for slot in self.slots:
            slot["blocks"] = {i: part.offload() for i, part in slot["blocks"].items()}

    def _slot_bytes(self, s: dict[str, Any]) -> int:
        return sum(part.nbytes for part in s["blocks"].values())

    def stop(self) -> None:
        """What the forward under way has put in it may take: it is dropped at the next choice of a slot, or when the step ends."""

    def drop(self) -> None:
        self.free()  # type: ignore[attr-defined]


@cache
def packed_class(plain: type) -> type:
    """A subclass of the host's cache class, so that ``isinstance`` holds."""
    return type(f"Packed{plain.__name__}", (PackedSlots, plain), {})


def packed_slots(plain: Any, run: CacheRun) -> Any:
    """A packed cache, empty, that stores where ``plain`` does. What ``plain`` has selected is selected in it."""
    made = packed_class(type(plain))(store_device=plain.store_device)
    made.run, made.passing = run, {}
    if plain.slot is not None and not plain.slot["blocks"]:
        made.slots, made.slot = [plain.slot], plain.slot
    run.stores.append(made)
    return made


def is_slots(thing: Any) -> bool:
    return any(cls.__name__ == "PoseBranchCache" for cls in type(thing).__mro__)


@dataclass
class Forward:
    """One forward: the conditions in its batch, and whether it reads what an earlier one stored of all of them."""

    chunks: Sequence[Hashable]
    reads: bool
    stored: bool = False
    queries: Tensor | None = None  # their energy in the attention under way


NOW: ContextVar[Forward | None] = ContextVar("tqai_cache_forward", default=None)


class PackedPairs:
    """In place of the dictionary of ``FluxKVCache``: name of an attention -> keys and values ``[B, heads, n, d]``.

    The host's has one entry an attention: where conditions run apart, the second one reads the first one's. Here each condition has
    its own, and a forward reads only where all its conditions have been stored to the end.
    """

    def __init__(self, run: CacheRun) -> None:
        self.run = run
        self._pairs: dict[Hashable, dict[str, Prefix]] = {}
        self._whole: set[Hashable] = set()  # conditions of which all attentions are stored

    @contextmanager
    def forward(self, chunks: Sequence[Hashable]) -> Iterator[None]:
        now = Forward(chunks, reads=bool(chunks) and all(chunk in self._whole for chunk in chunks))
        token = NOW.set(now)
        try:
            yield
            if now.stored and not self.run.full:
                self._whole.update(chunks)
        finally:
            NOW.reset(token)

    @torch.compiler.disable
    def __len__(self) -> int:
        now = NOW.get()
        return len(self._pairs) if now is not None and now.reads else 0

    @torch.compiler.disable
    def __contains__(self, name: object) -> bool:
        return len(self) > 0

    @torch.compiler.disable
    def see(self, q: Tensor, references: int) -> None:
        """The queries ``[B, heads, n, d]`` of an attention about to be stored; those of the references do not read them."""
        now = NOW.get()
        if now is not None and not now.reads and not self.run.full and q.shape[2] > references:
            now.queries = energy(q[:, :, :-references].transpose(1, 2), q.shape[1])

    @torch.compiler.disable
    def __setitem__(self, name: str, pair: tuple[Tensor, Tensor]) -> None:
        now = NOW.get()
        if now is None or self.run.full or pair[0].shape[0] % len(now.chunks):
            return
        seen, now.queries, now.stored = now.queries, None, True
        parts = [x.transpose(1, 2).chunk(len(now.chunks)) for x in pair]
        queries = [None] * len(now.chunks) if seen is None else seen.chunk(len(now.chunks))
        for chunk, k, v, own in zip(now.chunks, *parts, queries, strict=True):
            if chunk in self._whole or self.run.full:
                continue
            with self.run.lock:
                part = Prefix.pack(k, v, self.run.settings.plan(), own, interleaved=True, host=self.run.host)
                self._pairs.setdefault(chunk, {})[name] = part
                self.run.kept(part)

    @torch.compiler.disable
    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        now = NOW.get()
        assert now is not None
        found = [self._pairs[chunk][name].dense() for chunk in now.chunks]
        k, v = (torch.cat(part).transpose(1, 2) for part in zip(*found, strict=True))
        return k, v

    def layers(self) -> Iterator[tuple[str, Packed]]:
        yield from (found for pairs in self._pairs.values() for found in pairs.items())

    def offload(self) -> None:
        for pairs in self._pairs.values():
            pairs.update({name: part.offload() for name, part in pairs.items()})

    def stop(self) -> None:
        self.drop()  # a forward that stores reads nothing

    def drop(self) -> None:
        self._pairs, self._whole = {}, set()


@dataclass(frozen=True)
class Queries:
    """A patch in front of the one of ``FluxKVCache``: it sees the queries for whose sake keys are scaled, and changes nothing."""

    pairs: PackedPairs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if references := sum(extra_options.get("reference_image_num_tokens", [])):
            self.pairs.see(q, references)
        return {}
