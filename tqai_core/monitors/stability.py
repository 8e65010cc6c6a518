"""Forecast while the attention looks where it looked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..registry import param
from ..roles import Batch, EntropyMonitor, PackMonitor, TolerantMonitor
from ..types import Decision, Step
from . import distinct_sigmas, forced


@dataclass(frozen=True)
class Stability(
    EntropyMonitor, TolerantMonitor, PackMonitor, name="stability", paper="attention entropy as a sign of stability, Zhai et al. 2303.06296"
):
    """Watches the entropy of attention, head by head, on a few queries of a few layers (1 = looks everywhere, 0 = at one
    token). A step is forecast while the entropy, going on at its measured pace, would move less than ``tau``; a head that
    collapses by ``collapse`` below its running mean forces the next two evaluations. A signal on video, none on the image
    minis (docs/methods.md): prefer ``lyapunov``.
    At level kv a layer's tokens are held finer while its attention moves; it loses: 1.47 to 4.04 times the KL of a plain cache of equal
    bytes.
    """

    tau: float = param(0.01, "root mean square move of the heads' entropy that a forecast may miss", low=0.0, high=1.0)
    collapse: float = param(0.25, "drop of one head's entropy that forces a refresh", low=0.0, high=1.0)
    alpha: float = param(0.3, "weight of the newest entropy in the running mean", low=0.01, high=1.0)
    warmup: int = param(3, "different sigmas computed at the start", low=1, high=1000)
    max_gap: int = param(6, "most evaluations forecast in a row", low=1, high=1000)
    min_steps: int = param(16, "shorter schedules are left alone", low=1, high=1000)

    flush_tau: float = param(0.02, "level kv: the same between two flushes that base bits may miss", low=0.0, high=1.0, level="kv")

    recent_queries = 4

    def decide(self, step: Step, importance: float | None, order: int, state: dict[str, Any]) -> Decision:
        seen = distinct_sigmas(step, state)
        gap = state["gap"] = state.get("gap", 0) + 1
        pace, at = state.get("pace"), state.get("at")
        move = None if pace is None or at is None else pace * abs(step.sigma - at)
        tolerance = self.tau * (1.0 if importance is None else 1.3 - 0.9 * importance)
        if why := forced(step, seen, self.warmup):
            return Decision(True, why, move)
        if state.get("refresh", 0) > 0:
            state["refresh"] -= 1
            why = "a head's entropy collapsed"
        elif move is None:
            why = "no attention entropy was measured"
        elif gap > self.max_gap:
            why = f"{self.max_gap} forecasts in a row"
        elif move > tolerance:
            why = "attention moves too fast"
        else:
            return Decision(False, "attention is stable", move)
        return Decision(True, why, move)

    def observe(self, step: Step, error: float | None, order: int, state: dict[str, Any]) -> None:
        now, before, at = state.get("entropy"), state.get("before"), state.get("at")
        state["gap"] = 0
        if not now:
            return
        if before is not None and len(before) == len(now) and at is not None and at != step.sigma:
            state["pace"] = self._move(now, before, state) / abs(step.sigma - at)
        else:
            state["mean"] = list(now)
        state["before"], state["at"] = now, step.sigma

    def judge(self, batch: Batch) -> tuple[Decision, float | None]:
        """Level kv: the entropy of the recent queries' attention to the exact tokens. A flush is held finer while a layer's
        attention moves, and so are two after a head has collapsed."""
        state = batch.state
        if batch.q is None:
            return Decision(False, "this attention hides its queries"), None
        k, v, _ = batch.exact_rows()
        p = batch.attention(k, v)[0]
        entropy = torch.special.entr(p).sum(-1).mean((0, 2)) / math.log(max(p.shape[-1], 2))  # [heads]
        now, before = entropy.tolist(), state.get("before")
        state["before"] = now
        if before is None or len(before) != len(now):
            state["mean"] = now
            return Decision(False, "first look"), None
        move = self._move(now, before, state)
        if state.get("refresh", 0) > 0:
            state["refresh"] -= 1
            return Decision(True, "a head's entropy collapsed", move), None
        fast = move > self.flush_tau
        return Decision(fast, "attention moves too fast" if fast else "attention is stable", move), None

    def _move(self, now: list[float], before: list[float], state: dict[str, Any]) -> float:
        """Root mean square change of the heads' entropy. Where a head's has collapsed, the next two are to be refreshed."""
        move = (sum((a - b) ** 2 for a, b in zip(now, before, strict=True)) / len(now)) ** 0.5
        if any(mean - a > self.collapse for mean, a in zip(state["mean"], now, strict=True)):
            state["refresh"] = 2
        state["mean"] = [mean + self.alpha * (a - mean) for mean, a in zip(state["mean"], now, strict=True)]
        return move
