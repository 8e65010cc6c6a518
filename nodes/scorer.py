"""Sets what says which steps matter."""

from __future__ import annotations

from typing import Any

from .files import table
from .pipeline import NONE
from .stage import StageNode


class TQAIScorer(StageNode):
    role, choices = "scorer", (NONE,)
    description = "Sets the scorer of a tqai pipeline: it says how much a step matters, and the monitor allows less error there."
    tooltip = "What says how much a step, token or head matters."
    aliases = ("tqai", "importance", "snr", "cache")

    @classmethod
    def chosen(cls, choice: dict[str, Any] | None) -> dict[str, Any] | None:
        return {**choice, "file": table(choice["file"])} if choice and choice.get("file") else choice
