"""Reports of the last samplings, figures only. Knows no host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_SAMPLERS = 64


@dataclass
class Entry:
    """One sampling: ``patch`` is the id of the Compress node, ``sampler`` that of the node that sampled, if known."""

    patch: str | None
    sampler: str | None
    family: str
    report: dict[str, Any]
    done: bool = False


class RunHistory:
    """The last sampling of each sampler node. A second prompt that does not run the sampler again still finds its report."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str | None, str | None], Entry] = OrderedDict()

    def put(self, entry: Entry) -> None:
        with self._lock:
            key = (entry.sampler, entry.patch)
            self._entries.pop(key, None)
            self._entries[key] = entry
            while len(self._entries) > MAX_SAMPLERS:
                self._entries.popitem(last=False)

    def of(self, upstream: set[str]) -> list[Entry]:
        """Samplings whose sampler and Compress node are both among ``upstream``, oldest first."""
        with self._lock:
            return [e for e in self._entries.values() if e.sampler in upstream and e.patch in upstream]

    def last(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())[-1:]


HISTORY = RunHistory()


def upstream(prompt: Any, node: str | None) -> set[str]:
    """Ids of the nodes that ``node`` depends on, from an API-format prompt."""
    found: set[str] = set()
    todo = [str(node)] if node is not None else []
    while todo:
        inputs = (prompt or {}).get(todo.pop(), {}).get("inputs", {})
        for value in inputs.values():
            if isinstance(value, (list, tuple)) and len(value) == 2 and str(value[0]) not in found:
                found.add(str(value[0]))
                todo.append(str(value[0]))
    return found
