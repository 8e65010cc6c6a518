"""What ``apply`` returns: the report, and the exact undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import TqaiError
from .flow import Flow
from .report import Recorder, Report


class Handle:
    """A patched model. ``with tqai.apply(pipe, config) as handle:`` undoes itself."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []
        self.recorder = Recorder(lambda: sum(flow.counted for flow in self.flows))
        self._undo: list[Callable[[], None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held right now; 0 between generations."""
        return sum(flow.nbytes for flow in self.flows)

    def report(self) -> Report:
        """The generation under way, or the last one."""
        return self.recorder.report

    def cache(self) -> Any:
        """A new KV cache for ``past_key_values=``; language models only."""
        raise TqaiError("this handle holds no language model: caches come from tqai.apply(lm, tqai.Config(level='kv'))")

    def on_remove(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def remove(self) -> None:
        """The model as it was, bit for bit. May be called again."""
        while self._undo:
            self._undo.pop()()
        for flow in self.flows:
            flow.begin(flow.bypass_reason)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
