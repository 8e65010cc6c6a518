"""Sets what decides which steps are forecast."""

from .stage import StageNode


class TQAIMonitor(StageNode):
    role, choices = "monitor", ("lyapunov",)
    description = (
        "Sets the monitor of a tqai pipeline: it compares forecasts with computed steps and decides which steps may be forecast. A larger "
        "tolerance is faster, a smaller one is closer to the exact picture."
    )
    tooltip = "What decides which steps are computed and which are forecast."
    aliases = ("tqai", "tolerance", "step skip", "teacache", "easycache", "magcache")
