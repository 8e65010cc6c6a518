"""Sets how a step is forecast."""

from .stage import StageNode


class TQAIStrategy(StageNode):
    role, choices = "strategy", ("delta2",)
    description = (
        "Sets the strategy of a tqai pipeline: how the model's output at a step is forecast from the steps before it, and what is kept "
        "for that."
    )
    tooltip = "How a step is forecast from the steps before it."
    aliases = ("tqai", "forecast", "taylorseer", "step skip", "cache")
