"""Blocks in a store, packed on their way in and unpacked on their way out, and the counts of what happened."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

from torch import Tensor

from .block import BlockCoder, RawCoder
from .block_store import BlockStore
from .envelope import Miss

logger = logging.getLogger(__name__)


class Shelf:
    """Threads may share it. ``counts``: blocks and bytes saved and loaded, failures, seconds of CPU that packing and unpacking took."""

    def __init__(self, coder: BlockCoder | RawCoder, store: BlockStore) -> None:
        self.coder, self.store = coder, store
        self.counts: Counter[str] = Counter()
        self._saving: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, name: str) -> bool:
        """Whether the caller is to save this block: it is neither there nor on its way. End it with :meth:`save` or :meth:`release`."""
        with self._lock:
            if name in self._saving or self.store.has(name):
                return False
            self._saving.add(name)
            return True

    def release(self, name: str) -> None:
        with self._lock:
            self._saving.discard(name)

    def save(self, name: str, kv: Tensor, first: bool) -> bool:
        """Pack and write a claimed block. False where it cannot be held; the reason is logged."""
        start = time.thread_time()
        try:
            data = self.coder.encode(kv, name.encode(), first)
            spent = time.thread_time() - start
            self.store.put(name, data)
        except (Miss, OSError) as error:
            logger.warning("block %s is not stored: %s", name[:16], error)
            self.count(save_failures=1)
            return False
        finally:
            self.release(name)
        self.count(saved=1, saved_bytes=len(data), encode_seconds=spent)
        return True

    def load(self, name: str, out: Tensor) -> str:
        """Unpack a block into ``out``; empty, or why it has to be computed again. A block that is not what it should be is removed."""
        data = self.store.get(name)
        if data is None:
            self.count(missed=1)
            return "it is not in the store any more"
        start = time.thread_time()
        try:
            self.coder.decode(data, name.encode(), out)
        except Miss as error:
            self.store.drop(name)
            self.count(refused=1)
            return str(error)
        self.count(loaded=1, loaded_bytes=len(data), decode_seconds=time.thread_time() - start)
        return ""

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        with self._lock:
            found, self.counts = self.counts, Counter()
        return dict(found)

    def count(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                self.counts[name] += value  # type: ignore[assignment]
