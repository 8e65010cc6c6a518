"""Threads for work that must not hold its caller up: what is urgent first, and only so much of the rest waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

Job = Callable[[], None]


class Pool:
    """``threads`` that run jobs, which must not raise. ``most`` jobs that are not urgent may wait."""

    def __init__(self, threads: int, most: int, name: str = "tqai") -> None:
        self._most, self._open, self._running = most, True, 0
        self._urgent: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Sequence[Job], urgent: bool = False, wait: bool = False) -> bool:
        """Queue all of ``jobs``, or none of them where they would be too many; with ``wait`` once there is room."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._open or len(self._others) + len(jobs) <= max(self._most, len(jobs)))
            elif not urgent and len(self._others) + len(jobs) > self._most:
                return False
            if not self._open:
                return False
            (self._urgent if urgent else self._others).extend(jobs)
            self._changed.notify_all()
            return True

    @property
    def idle(self) -> bool:
        with self._changed:
            return not (self._urgent or self._others or self._running)

    def wait(self) -> None:
        """Until nothing runs or waits."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._urgent or self._others or self._running))

    def close(self) -> None:
        """Finish what was queued, and end the threads."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread's own products: there are others for the rest
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._others or not self._open)
                if not self._urgent and not self._others:
                    return
                job = (self._urgent or self._others).popleft()
                self._running += 1
            try:
                job()
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()
