"""Sets what says which steps matter."""

from .pipeline import NONE
from .stage import StageNode


class TQAIScorer(StageNode):
    role, choices = "scorer", (NONE,)
    description = (
        "Sets which steps matter most: where a step matters more, TQAI Monitor allows less error. An optional part of a tqai pipeline; "
        "without this node all steps count the same."
    )
    tooltip = "How it is judged which steps matter. none: all count the same."
    aliases = ("tqai", "importance", "snr", "cache")
