"""Forecast while the measured error of the forecasts allows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..registry import param
from ..roles import Batch, PackMonitor, TolerantMonitor
from ..types import Decision, Step
from . import distinct_sigmas, forced

# A sampler that adds noise: the forecast does not know the noise of its step, which the measured error counts in. Later steps
# replace that noise again, so that single forecasts may err by so many times more.
NOISY = 6.0
SURPRISE = 1.5  # times the estimate: errors of one model's own forecasts stay below it
ROUGH = 4  # steps in a row at which the forecast was no better than the last value: the history tells nothing
# Near the end outputs bend: an estimate there is several times too small, and no later step corrects the error.
NEAR_END = 0.35
CALM = 0.18  # sigma below which a sampler that comes back to each sigma with fresh noise replaces little of what was made
LOOK = 8  # sigmas after which such a run that had no forecast is left exact


@dataclass(frozen=True)
class Lyapunov(
    TolerantMonitor, PackMonitor, name="lyapunov", aliases=("error_control",),
    paper="step-size control of multistep ODE solvers (Hairer, Norsett, Wanner, Solving ODEs I, III.5)",
):  # fmt: skip
    """At every computed step the forecast is compared with the exact output, which is free. The error is carried over to
    the coming step by the remainder of interpolation, and the step is forecast while that stays below the tolerance.
    At level kv tokens are held finer where packing them changes what recent queries see by more than ``tau``: a bound on the error,
    not a gain (1.12 to 1.17 times the KL of a plain cache of equal bytes on the trained LM).

    The remainder of a polynomial through the last order + 1 computed sigmas grows as the product of the distances to
    them. The tolerance is tau / sqrt(width) * (1.3 - .9 importance): ``width`` is the sampler's step from here relative
    to its mean step, since an error counts in proportion to it; without a scorer the last factor is 1. One tau then
    means the same on every grid and shift. In steps that end at a sigma below .1, and in the last but one, the tolerance is
    smaller: outputs bend there, so that the estimate is too small, and no later step corrects the error. The first
    ``warmup`` sigmas of a model and the last one are computed. Where a sampler evaluates a sigma again, the error measured at
    such a repeat bounds that of the next one.
    """

    tau: float = param(0.06, "relative error a forecast may have", low=0.0, high=10.0)
    warmup: int = param(3, "different sigmas computed at the start", low=1, high=1000)
    max_gap: int = param(6, "most evaluations forecast in a row", low=1, high=1000)
    min_steps: int = param(16, "shorter schedules are left alone", low=1, high=1000)

    recent_queries = 4

    def idle(self, step: Step) -> str | None:
        return "tau=0 allows no forecast" if self.tau == 0 else super().idle(step)

    def decide(self, step: Step, importance: float | None, order: int, state: dict[str, Any]) -> Decision:
        seen = distinct_sigmas(step, state)
        gap = state["gap"] = state.get("gap", 0) + 1
        estimate = self._estimate(step, order, state)
        state["repeats"] = step.repeats(state.get("sigma"))
        state["sigma"] = step.sigma
        noisy = state.get("fresh_noise", 0.0) > 0
        ends = step.near_end or (step.next is not None and seen + 1 == step.total)  # the last step corrects nothing either
        tolerance = (
            self._tolerance(step)
            * (NOISY if noisy else NEAR_END if ends else 1.0)
            * (1.0 if importance is None else 1.3 - 0.9 * importance)
        )
        why = forced(step, seen, self.warmup)
        if why:
            return Decision(True, why, estimate, tolerance)
        if estimate is None:
            why = "no forecast to judge by"
        elif gap > (most := 1 if noisy else self.max_gap):
            why = f"{most} forecasts in a row"
        elif noisy and "repeat_error" in state and step.sigma < CALM:
            why = "no later noise covers an error"
        elif noisy and state.get("unmeasured", 0) >= self.max_gap:
            why = f"{self.max_gap} forecasts that no error was measured for"
        elif not estimate <= tolerance:
            why = "estimate over the tolerance"
        else:
            state["forecasts"], state["unmeasured"] = True, state.get("unmeasured", 0) + 1
            return Decision(False, "estimate within the tolerance", estimate, tolerance)
        return Decision(True, why, estimate, tolerance)

    def restart(self, state: dict[str, Any]) -> None:
        for name in ("nodes", "error", "remainder", "repeat_error"):
            state.pop(name, None)

    def fits(self, step: Step, error: float, order: int, state: dict[str, Any]) -> bool:
        """Where it errs no more than it would have, had its own model gone on, or no more than a forecast may."""
        return error <= max(self._tolerance(step), SURPRISE * (self._estimate(step, order, state) or 0.0))

    def _tolerance(self, step: Step) -> float:
        return self.tau / max(step.width, 1e-6) ** 0.5

    def gives_up(self, state: dict[str, Any]) -> str | None:
        if state.get("rough", 0) >= ROUGH:
            return f"its output does not change smoothly: forecasts erred more than plain reuse would at {ROUGH} steps in a row"
        error, most = state.get("error"), NOISY * self.tau
        waited = state.get("fresh_noise") and len(state["sigmas"]) >= LOOK and "forecasts" not in state
        if not waited or error is None or error <= 1.5 * most:  # some samplers add less noise later
            return None
        return f"the sampler adds fresh noise at every step: a forecast would err by {error:.2f} of the output, more than {most:.2f}"

    def _estimate(self, step: Step, order: int, state: dict[str, Any]) -> float | None:
        """The error that a forecast at ``step`` would have, or None while nothing was measured to judge by."""
        if state.get("error") is None:
            return None
        estimate = state["error"] * _remainder(step.sigma, state["nodes"], order) / state["remainder"]
        if not step.repeats(state["sigma"]):
            return estimate
        # the sampler evaluates a sigma again, at another latent: no distance in sigma tells how far that is
        return None if "repeat_error" not in state else max(estimate, state["repeat_error"])

    def observe(self, step: Step, error: float | None, order: int, state: dict[str, Any]) -> None:
        nodes = state.setdefault("nodes", [])
        state["gap"] = 0
        known = any(map(step.repeats, nodes))
        fresh = state.get("fresh_noise", 0.0) > 0 and state.get("repeats", False)  # the error is that of the sampler's noise
        if known or fresh:
            if error is not None:
                state["repeat_error"] = error
            if not known:
                nodes.append(step.sigma)
                del nodes[: -order - 1]
            return
        state["unmeasured"] = 0
        if error is not None and len(nodes) > order:  # a forecast through fewer nodes is one of a lower order
            state["error"], state["remainder"] = error, _remainder(step.sigma, nodes, order)
            enough = max(state.get("reuse") or math.inf, self._tolerance(step))  # within the tolerance it may be worse than reuse
            worse = not state.get("fresh_noise") and error > enough
            state["rough"] = state.get("rough", 0) + 1 if worse else 0
        nodes.append(step.sigma)
        del nodes[: -order - 1]

    def judge(self, batch: Batch) -> tuple[Decision, float | None]:
        """Level kv: the error that packing these tokens makes in the recent queries' attention, measured against the exact rows
        while both are there: at the first ``warmup`` flushes, every ``max_gap``-th one, and whenever the last error, grown by its
        exponent, would pass tau. Held finer where the measured error does."""
        state = batch.state
        seen = state["seen"] = state.get("seen", 0) + 1
        gap = state["gap"] = state.get("gap", 0) + 1
        estimate = None
        if state.get("error") is not None:
            estimate = state["error"] * math.exp(min(max(state.get("exponent", 0.0), 0.0) * gap, 50.0))
        if seen > self.warmup and gap < self.max_gap and estimate is not None and estimate <= self.tau:
            return Decision(False, "estimate within the tolerance", estimate), None
        if batch.error is None:
            return Decision(False, "this attention hides its queries", estimate), None
        error = float(batch.error)
        if state.get("error") and error > 0:
            state["exponent"] = math.log(error / state["error"]) / gap
        state["error"], state["gap"] = error, 0
        return Decision(error > self.tau, "measured over the tolerance" if error > self.tau else "measured", estimate), error


def _remainder(sigma: float, nodes: Sequence[float], order: int) -> float:
    """Product of the distances to the nodes a forecast of this order goes through."""
    return math.prod(abs(sigma - node) for node in nodes[-order - 1 :])
