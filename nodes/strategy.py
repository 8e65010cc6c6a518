"""Sets how a step is forecast."""

from .stage import StageNode


class TQAIStrategy(StageNode):
    role, choices = "strategy", ("delta2",)
    description = (
        "Sets what takes the place of a step that is not computed: a forecast made from the steps before it. A part of a tqai pipeline; "
        "without this node it is a straight line through the last two steps."
    )
    tooltip = "How a step is forecast. delta2: a straight line through the last two computed steps. delta: the last one again."
    aliases = ("tqai", "forecast", "taylorseer", "step skip", "cache")
