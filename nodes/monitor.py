"""Sets what decides which steps are forecast."""

from .stage import StageNode


class TQAIMonitor(StageNode):
    role, choices = "monitor", ("lyapunov",)
    description = (
        "Sets how many steps are skipped. Each computed step shows how wrong its forecast would have been; while that error stays under a "
        "tolerance, steps are skipped. A larger tolerance is faster, a smaller one is closer to the exact picture. A part of a tqai "
        "pipeline."
    )
    tooltip = "What decides which steps are computed. lyapunov: the measured error; fixed: one step in a few, whatever the error."
    aliases = ("tqai", "tolerance", "step skip", "teacache", "easycache", "magcache")
