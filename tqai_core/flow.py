"""The way of a tensor, top to bottom. Read this file first.

::

            sigma, history                      one gate a step, all sites and branches
  step ---> Monitor.decide(step, score) ------> compute ----------------------> forecast
                                                  |                                |
  x = the site's own output  <--------------------+                 Strategy.forecast(stream, step)
     |                                                                             |
   Scorer.score(x) -> Strategy.plan -> parts, bits -> Codec.encode -> Packed -> memory
     |                                                                             |
   Monitor.observe(forecast against x)   (free: the truth is here)                 v
     +--------------------------------- x goes on exact                     x^ goes on
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .config import Config
from .memory import Memory
from .metrics import relative, squares
from .registry import Monitor, Strategy
from .report import Recorder
from .types import Decision, Part, Step, Where, nbytes, signature


class Flow:
    """One model's pipeline and the state of its current generation.

    ``agree`` makes the ranks of a distributed run see one error: it sums a small tensor over them.
    """

    def __init__(self, config: Config, recorder: Recorder, model: str = "transformer", agree: Callable[[Tensor], Tensor] | None = None):
        self.scorer, strategy, monitor, self.codec = config.build()
        self.strategy, self.monitor = cast(Strategy, strategy), cast(Monitor, monitor)
        self.off = "no strategy is set" if strategy is None else "no monitor is set" if monitor is None else None
        self.recorder, self.model, self.agree = recorder, model, agree or (lambda sums: sums)
        self.memory = Memory(self.codec)
        self.begin()

    def begin(self, bypass: str | None = None) -> None:
        """A new generation. ``bypass`` is the reason why everything is computed exactly, if there is one."""
        self.memory.clear()
        self.bypass = self.off or bypass
        self.gate: dict[str, Any] = {}
        self.scores: dict[str, Any] = {}
        self.decision = Decision(True, "start")
        self.step: Step | None = None
        self.exact: set[Where] = set()
        self._first: set[Where] | None = None  # streams of the first evaluation; None before it
        self._pending: list[tuple[Where, bool, Tensor]] = []
        self._entry: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + nbytes([self.gate, self.scores])

    def enter(self, step: Step) -> Decision:
        """The gate: one decision a step, for all sites and branches."""
        self._settle()
        self._first = set() if self.step is None else (self._first or set())
        self.opening, self.step = self.step is None, step
        if self.bypass is not None:
            self.decision = Decision(True, self.bypass)
            self.recorder.fallback(self.model, self.bypass)
        else:
            score = self.scorer.score(None, step, self.scores) if self.scorer else None
            importance = None if score is None else float(score)
            self.decision = self.monitor.decide(step, importance, self.strategy.order, self.gate)
        self._entry = self.recorder.decision(self.model, step, self.decision)
        return self.decision

    def through(self, where: Where, compute: Callable[[], Tensor]) -> Tensor:
        """One site's tensor at this step: its own exact output, or the forecast."""
        step, strategy = self.step, self.strategy
        if step is None or self._first is None:
            raise RuntimeError("enter(step) comes before through()")
        if self.opening:
            self._first.add(where)
        if not self.decision.compute and where in self.memory.streams and where not in self.exact:
            stream = self.memory[where]
            guess = strategy.forecast(stream, step)
            stream.decoded.clear()
            if guess is not None and stream.kind is not None:
                self.recorder.call(self.model, where, skipped=True)
                return guess.to(stream.kind[1], copy=True)  # the host may write into what it gets
        x = compute()
        self.recorder.call(self.model, where, skipped=False)
        if self.bypass is None and self._may_hold(where, x):
            self._observe(where, x, step)
        return x

    def end(self) -> None:
        """The generation is over: nothing stays held."""
        if self.step is not None:
            self._settle()
        self.begin(self.bypass)

    def _may_hold(self, where: Where, x: Tensor) -> bool:
        if where in self.exact:
            return False
        if x.requires_grad:
            why = "gradients are recorded: run under torch.no_grad() to let tqai forecast"
        elif not x.is_floating_point():
            why = f"its output is {x.dtype}, no float"
        elif where not in (self._first or ()):
            why = "it appeared after the first evaluation, so its history is unknown"
        else:
            return True
        self._give_up(where, why)
        return False

    def _observe(self, where: Where, x: Tensor, step: Step) -> None:
        stream = self.memory[where]
        if stream.kind is not None and stream.kind != signature(x):
            self.recorder.fallback(f"{self.model}/{where}", "shape, dtype or device changed: its history starts anew")
            self.memory.streams.pop(where)
            stream = self.memory[where]
        guess = self.strategy.forecast(stream, step)
        self._pending.append((where, guess is not None, squares(guess, x)))
        score = self.scorer.score(x, step, stream.state) if self.scorer else None
        if x.numel():
            stream.hold({name: _finite(part) for name, part in self.strategy.plan(x, score, stream, step).items()}, x, step)
        copies = self.strategy.order + 1
        exact = sum(s.kind[0].numel() * 2 * copies for s in self.memory.streams.values() if s.kind)
        self.recorder.held(self.model, where, stream.nbytes, exact)

    def _settle(self) -> None:
        """Read the errors of the last computed step: one host sync a step, and only after computed ones."""
        if not self._pending or self.step is None:
            return
        sums = self.agree(torch.stack([s.to(self._pending[0][2].device) for _, _, s in self._pending])).tolist()
        gap = truth = 0.0
        judged = False
        for (where, guessed, _), (g, t) in zip(self._pending, sums, strict=True):
            if not (g < float("inf") and t < float("inf")):  # NaN fails both
                self._give_up(where, "NaN or inf in its output")
                continue
            if guessed:
                judged, gap, truth = True, gap + g, truth + t
                self.recorder.error(self.model, where, relative(g, t))
        error = relative(gap, truth) if judged else None
        self._entry["error"] = error
        self.monitor.observe(self.step, error, self.strategy.order, self.gate)
        self._pending.clear()

    def _give_up(self, where: Where, why: str) -> None:
        self.exact.add(where)
        self.memory.streams.pop(where, None)
        self.recorder.fallback(f"{self.model}/{where}", why)


def _finite(part: Part) -> Part:
    """Codecs need finite numbers. A tensor that had others is found by its norm when the step settles, and never used."""
    return Part(torch.nan_to_num(part.tensor, posinf=0.0, neginf=0.0), part.bits)
