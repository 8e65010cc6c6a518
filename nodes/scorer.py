"""Sets what says which steps matter."""

from .pipeline import NONE
from .stage import StageNode


class TQAIScorer(StageNode):
    role, choices = "scorer", (NONE,)
    description = "Sets the scorer of a tqai pipeline: it says how much a step matters, and the monitor allows less error there."
    tooltip = "What says how much a step, token or head matters."
    aliases = ("tqai", "importance", "snr", "cache")
