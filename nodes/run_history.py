"""Reports of the last samplings, figures only. Knows no host."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

MAX_SAMPLERS = 64


@dataclass
class Entry:
    """One sampling: ``patch`` is the id of the Compress or Cache node, ``sampler`` that of the node that sampled, if known. ``cache``:
    the report is one of packed caches."""

    patch: str | None
    sampler: str | None
    family: str
    report: dict[str, Any]
    done: bool = False
    cache: bool = False

    @property
    def head(self) -> str:
        return self.family + (", cache" if self.cache else "") + (f", sampler {self.sampler}" if self.sampler else "")


class RunHistory:
    """The last sampling of each sampler node. A second prompt that does not run the sampler again still finds its report."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[str | None, str | None], Entry] = {}

    def put(self, entry: Entry) -> None:
        with self._lock:
            self._entries.pop(key := (entry.sampler, entry.patch), None)
            self._entries[key] = entry  # the newest is the last
            if len(self._entries) > MAX_SAMPLERS:
                del self._entries[next(iter(self._entries))]

    def of(self, upstream: set[str]) -> list[Entry]:
        """Samplings whose sampler and Compress or Cache node are both among ``upstream``, oldest first."""
        with self._lock:
            return [e for e in self._entries.values() if e.sampler in upstream and e.patch in upstream]

    def last(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())[-1:]


HISTORY = RunHistory()


def upstream(prompt: Any, node: str | None, through: str | None = None) -> set[str]:
    """Ids of the nodes that ``node`` depends on, from an API-format prompt; with ``through``, by this one input of it."""
    found: set[str] = set()
    todo = [str(node)]
    while todo:
        inputs = (prompt or {}).get(todo.pop(), {}).get("inputs", {})
        given = inputs.values() if through is None or found else [inputs.get(through)]
        links = {str(value[0]) for value in given if isinstance(value, (list, tuple)) and len(value) == 2}
        todo += links - found
        found |= links
    return found
