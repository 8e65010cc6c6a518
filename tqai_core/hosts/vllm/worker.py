"""The half of the connector that moves: blocks of a CPU engine's cache to the store and back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from ...kv.pool import Pool
from ...kv.shelf import Shelf
from .tiles import Tiles
from .work import Place, Work

logger = logging.getLogger("vllm.tqai")


class Mover:
    """``caches``: the cache of each layer ``[blocks, ...]``, in the order of the layers; ``probe()`` gives the tiles, once the backend is
    ready; ``rank`` is a part of the names of this worker's blocks."""

    def __init__(self, caches: list[Tensor], shelf: Shelf, pool: Pool, probe: Callable[[], Tiles], rank: int) -> None:
        self._caches, self._shelf, self._pool, self._probe, self._rank = caches, shelf, pool, probe, rank
        self._lock = threading.Lock()
        self._local = threading.local()
        self._bad: set[int] = set()  # blocks whose load failed, until vLLM is told
        self._loaded: set[str] = set()  # requests whose load in the background has ended

    @cached_property
    def _tiles(self) -> Tiles:
        return self._probe()

    def load(self, work: Work, wait: bool) -> None:
        """Begin the loads of a step; ``wait`` for them too. A block that cannot be loaded is told to vLLM, which computes it again."""
        ends = []
        for request, places in work.loads.items():
            _ = self._tiles  # here, not in several threads at once
            ended = threading.Event()
            ends.append(ended)
            left = [len(places)]
            done = ended.set if wait else partial(self._in_background, request)
            jobs = [partial(self._load, place, left, done) for place in places]
            if not self._pool.submit(jobs, urgent=True):
                for job in jobs:
                    job()
        for ended in ends if wait else []:
            ended.wait()

    def _load(self, place: Place, left: list[int], done: Callable[[], None]) -> None:
        why = "an error, see above"
        try:
            why = self._unpack(place)
        except Exception:  # whoever waits for the others must be told
            logger.exception("tqai: a block could not be loaded")
        if why:
            logger.warning("tqai: block %s is computed again: %s", place.name[:16], why)
        with self._lock:
            if why:
                self._bad.add(place.block)
            left[0] -= 1
            if not left[0]:
                done()

    def _in_background(self, request: str) -> None:
        self._loaded.add(request)

    def _unpack(self, place: Place) -> str:
        if not hasattr(self._local, "rows"):
            self._local.rows = torch.empty(self._rows_shape, dtype=self._caches[0].dtype)
        rows: Tensor = self._local.rows
        why = self._shelf.load(f"{place.name}_{self._rank}", rows.transpose(0, 1))
        if not why:
            for cache, own in zip(self._caches, rows.flatten(1), strict=True):
                torch.index_select(own, 0, self._tiles.physical, out=cache[place.block].view(-1))
        return why

    @property
    def _rows_shape(self) -> tuple[int, ...]:
        _, layers, *rest = self._shelf.coder.shape
        return (layers, 2, *rest)

    def save(self, work: Work) -> None:
        """Copy the blocks of a step and queue them. A request that read a block whose load failed has computed nothing that may be kept."""
        with self._lock:
            bad = set(self._bad)
        for request, places in work.saves.items():
            if bad.intersection(work.reads[request]):
                continue
            for place in places:
                name = f"{place.name}_{self._rank}"
                if not self._shelf.claim(name):
                    continue
                _ = self._tiles
                memory = torch.stack([cache[place.block].reshape(-1) for cache in self._caches])
                self._pool.submit([partial(self._save, name, memory, place.first)], wait=True)

    def _save(self, name: str, memory: Tensor, first: bool) -> None:
        try:
            rows = memory.index_select(1, self._tiles.logical).view(self._rows_shape)
            self._shelf.save(name, rows.transpose(0, 1), first)
        except Exception:  # a lost save is a later miss, a dead thread is not
            logger.exception("tqai: a block could not be saved")
            self._shelf.release(name)

    def take_bad(self) -> set[int]:
        """Blocks that could not be loaded since the last call."""
        with self._lock:
            bad, self._bad = self._bad, set()
        return bad

    def take_loaded(self) -> set[str]:
        """Requests whose loads in the background have ended since the last call, well or not."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return loaded
