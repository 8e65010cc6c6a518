"""The way of a tensor, top to bottom. Read this file first.

::

            sigma, history                      one gate a step, all sites and branches
  step ---> Monitor.decide(step, score) ------> compute ----------------------> forecast
                                                  |                                |
  x = the site's own output  <--------------------+                 Strategy.forecast(stream, step)
     |                                                                             |
   Scorer.score(x) -> Strategy.plan -> parts, bits -> Codec.encode -> Packed -> memory
     |                                                                             |
   Monitor.observe(forecast against x)   (free: x is known here)                   v
     +--------------------------------- x goes on exact*                    x^ goes on

* at level model, where the sampler is Euler: plus the error of the forecasts before it (``Forecaster.correction``)

A host calls ``begin`` for a generation, ``enter`` for a step, then ``apply`` for each site; or, where a site is asked in one place
and computed in another (:class:`site.Site`), ``should_skip``, ``forecast``, ``correction`` and ``observe``; and ``end``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .config import Config
from .guidance import Difference
from .half_size import HalfSize
from .legacy import Legacy
from .memory import Memory, Stream
from .metrics import relative, squares
from .report import Recorder
from .roles import AttentionForecaster, AttentionSite, BlockScorer, Forecaster, ScoredForecaster, StepMonitor, StepScorer, TolerantMonitor
from .sampler_noise import LEAST
from .tokens import tokens
from .types import Decision, Part, Step, Where, nbytes, signature


class Flow:
    """One model's pipeline and the state of its current generation.

    Args:
        config: the methods.
        recorder: writes the report.
        model: the model's name in the report.
        agree: sums a small tensor over the ranks of a distributed run, so that all of them see one error.
        allow_new_streams: for hosts whose branches come and go during a run (ComfyUI's timed prompts and moving windows). Steps
            are computed until a new stream has a history; a stream that a computed step did not have is dropped.
    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        model: str = "transformer",
        agree: Callable[[Tensor], Tensor] | None = None,
        allow_new_streams: bool = False,
    ):
        scorer, strategy, monitor, self.codec = config.build()
        self.scorer = cast(StepScorer | None, scorer)
        self.strategy, self.monitor = cast(Forecaster, strategy), cast(StepMonitor, monitor)
        self.disabled_reason = "no strategy is set" if strategy is None else "no monitor is set" if monitor is None else None
        self.recorder, self.model, self.agree, self.allow_new_streams = recorder, model, agree or (lambda sums: sums), allow_new_streams
        self.memory = Memory(self.codec)
        self.guidance = Difference(self.memory, strategy.cfg == "difference" if strategy else False)
        self.half_size = HalfSize(config.half_size)
        self.begin()

    def begin(self, bypass: str | None = None) -> None:
        """A new generation. ``bypass`` is the reason why everything is computed exactly, if there is one."""
        self.memory.clear()
        self.guidance.begin()
        self.half_size.begin()
        self.bypass_reason = self.disabled_reason or bypass
        self.gate_state = Stream(self.codec)  # state of the monitor, and of the scorer where it scores steps
        self.decision = Decision(True, "start")
        self.legacy: Legacy | None = None  # another expert's history, until the first step has judged it
        self._inherited: dict[Where, Stream] = {}  # its streams, with the first step's values in them
        self.step: Step | None = None
        self._renewed = False  # the sampler put fresh noise in and asks for the sigma of the last evaluation again
        self.exact: set[Where] = set()
        self.fresh_noise = 0.0  # share of a latent that the sampler's own noise makes up, where the host measures it
        self.importance: float | None = None  # mean score of the last computed step
        self.skipped_steps: list[tuple[float, float]] = []  # (sigma, width) of the steps forecast since the last computed one
        self._first: set[Where] | None = None  # streams of the first evaluation; None before it
        self._pending: list[tuple[Where, bool, Tensor]] = []
        self._signals: dict[str, list[Tensor]] = {}
        self._entry: dict[str, Any] = {}

    def leave(self) -> Legacy | None:
        """What an expert held until now, for the :meth:`inherit` of the one that goes on; only whole outputs go on from model to model."""
        if self.step is not None:
            self.settle()
        streams = {where: s for where, s in self.memory.streams.items() if where.site == "model" and s.kind is not None}
        if not streams or self.step is None or self.guidance.on:
            return None
        skipped = list(self.skipped_steps)  # as enter() would go on from here
        if self.decision.compute or self.step.next is None:
            skipped = []
        else:
            skipped.append((self.step.sigma, self.step.next - self.step.sigma))
        return Legacy(streams, dict(self.gate_state.state), skipped)

    def inherit(self, legacy: Legacy | None) -> None:
        """Before the first step: what another expert held. That step is computed, and its error says whether the history fits: then
        there is no second warm-up, else it is dropped."""
        self.legacy = None if self.bypass_reason is not None or self.guidance.on else legacy

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + self._beside

    @property
    def counted(self) -> int:
        """``nbytes``, walked stream by stream as they change instead of all at once."""
        return self.memory.counted + self._beside

    @property
    def _beside(self) -> int:
        """Bytes beside the memory: the gate's state, and another expert's streams until they are judged."""
        left = [s.tensors for s in (*(self.legacy.streams.values() if self.legacy else ()), *self._inherited.values())]
        return nbytes([self.gate_state.state, left])

    def enter(self, step: Step) -> Decision:
        """The gate: one decision a step, for all sites and branches."""
        if self.bypass_reason is not None and self.step is not None:  # idle since the first one: nothing is held, nothing was judged
            self.opening, self.step = False, step
            self._entry = self.recorder.decision(self.model, step, self.decision)
            self._size(step)
            return self.decision
        self.settle()
        if self.step is not None and self.bypass_reason is None and (why := self.monitor.gives_up(self.gate_state.state)):
            self.bypass(why)
            return self.enter(step)
        if self.allow_new_streams and self.decision.compute and self.step is not None:
            self.memory.keep(self.step)
        self._first = set() if self.step is None else (self._first or set())
        if self.step is None or self.decision.compute:
            self.skipped_steps = list(self.legacy.skipped) if self.legacy is not None and self.step is None else []
        else:
            self.skipped_steps.append((self.step.sigma, step.sigma - self.step.sigma))
        self._renewed = self.step is not None and self.fresh_noise > LEAST and step.repeats(self.step.sigma)
        self.opening, self.step = self.step is None, step
        if self.opening and self.bypass_reason is None:
            self.bypass_reason = self.monitor.idle(step)
        if self.bypass_reason is not None:
            self.legacy, self.decision = None, Decision(True, self.bypass_reason)
            self.recorder.fallback(self.model, self.bypass_reason)
        else:
            score = self.scorer.score(None, step, self.gate_state) if self.scorer else None
            importance = self.importance if score is None else float(score)
            if self.opening and self.scorer:
                self._check_scorer(of_tokens=score is None)
            self.gate_state.state["fresh_noise"] = self.fresh_noise if self.fresh_noise > LEAST else 0.0
            self.decision = self.monitor.decide(step, importance, self.strategy.order, self.gate_state.state)
            if not self.decision.compute and any(s.kind and s.count <= self.strategy.order for s in self.memory.streams.values()):
                self.decision = Decision(True, "a branch has too short a history", self.decision.error_estimate)
        self.guidance.enter(step, self.decision)
        self._entry = self.recorder.decision(self.model, step, self.decision)
        self._size(step)
        return self.decision

    def _size(self, step: Step) -> None:
        """Half or full size for this step. The first one of full size is computed, and says nothing of the errors before it: finer
        detail comes in."""
        if self.half_size.enter(step.sigma):
            self.skipped_steps = []
            if not self.decision.compute:
                self.revise("the first step of full size")
        if self.half_size.small(step.sigma):
            self._entry["half_size"] = True

    def bypass(self, why: str) -> None:
        """The rest of the generation is computed exactly, and nothing stays held."""
        self.memory.clear()
        self._pending.clear()
        self.bypass_reason, self.decision = why, Decision(True, why)
        self.recorder.fallback(self.model, why)

    def restart(self, why: str) -> None:
        """The model is called with other inputs than those that the history comes from: it is dropped, and the step is computed."""
        for where in [where for where, stream in self.memory.streams.items() if stream.step is not self.step]:
            self.memory.drop(where)
        self.monitor.restart(self.gate_state.state)
        self.skipped_steps, self.legacy, self._inherited = [], None, {}
        self.recorder.fallback(self.model, f"{why}: computed from here until there is a new history")
        if not self.decision.compute:
            self.revise(why)

    def revise(self, why: str) -> None:
        """The host cannot take forecasts at this step after all: from here on it is computed."""
        self.decision = Decision(True, why, self.decision.error_estimate)
        self._entry.update(action="compute", why=why)

    def apply(self, where: Where, compute: Callable[[], Tensor], sibling: Where | None = None) -> Tensor:
        """One site's tensor at this step: its own exact output, or the forecast. ``sibling`` is the same site of the
        guidance branch that has run already, if there is one."""
        if self.should_skip(where):
            return self.forecast(where)
        if sibling is not None and self.should_predict_from_sibling(where, sibling):
            return self.predict_from_sibling(where, sibling)
        x = compute()
        correction = self.correction(where, x)
        self.observe(where, x, sibling)
        return x if correction is None else x + correction

    def correction(self, where: Where, x: Tensor) -> Tensor | None:
        """What to add to ``x``, so that the sampler's step from here cancels the error of the forecasts before it."""
        step, stream = cast(Step, self.step), self.memory.streams.get(where)
        if self.legacy is not None:
            stream = self._fitting(where, x)
        if (
            not self.skipped_steps
            or step.next is None
            or self.fresh_noise > LEAST
            or step.next == step.sigma
            or self.bypass_reason is not None
            or self.guidance.on
        ):
            return None
        if stream is None or stream.kind != signature(x) or where in self.exact or x.requires_grad:
            return None
        error = self.strategy.correction(x, stream, step, self.skipped_steps)
        return None if error is None else error.div_(step.next - step.sigma).to(x.dtype)

    def should_skip(self, where: Where) -> bool:
        """Whether this site is forecast at this step."""
        if self.step is None:
            raise RuntimeError("enter(step) comes first")
        if self.decision.compute or where in self.exact:
            return False
        stream = self.memory.streams.get(where)
        return stream is not None and stream.kind is not None

    def forecast(self, where: Where, called: bool = True, step: Step | None = None) -> Tensor:
        """The forecast of a site that ``should_skip``. ``called=False`` for the second tensor of one call, ``step`` for one with a
        schedule of its own."""
        stream = self.memory[where]
        guess = self.strategy.forecast(stream, step or cast(Step, self.step))
        stream.decoded.clear()
        if called:
            self.recorder.call(self.model, where, skipped=True)
        return guess.to(stream.kind[1], copy=True)  # type: ignore[index,union-attr]  # the host may write into what it gets

    def should_predict_from_sibling(self, where: Where, sibling: Where) -> bool:
        """Whether a computed step takes this branch from ``sibling`` and the forecast difference of the two."""
        return self.bypass_reason is None and where not in self.exact and self.guidance.due(where, sibling, cast(Step, self.step))

    def predict_from_sibling(self, where: Where, sibling: Where, called: bool = True) -> Tensor:
        """The tensor of a branch that is not computed. It is held as if it were, and no error is measured."""
        x = self.guidance.other(where, sibling, self.strategy, cast(Step, self.step))
        if called:
            self.recorder.call(self.model, where, skipped=True)
        self._hold(where, x, cast(Step, self.step))
        return x

    def observe(
        self,
        where: Where,
        x: Tensor,
        sibling: Where | None = None,
        called: bool = True,
        against: Tensor | None = None,
        step: Step | None = None,
    ) -> None:
        """A site computed ``x``: compare its forecast with ``x``, and hold the parts that the strategy plans. The error counts relative
        to ``x``, or to ``against`` where ``x`` is only a part of the output."""
        if self.step is None or self._first is None:
            raise RuntimeError("enter(step) comes before observe()")
        step = step or self.step
        if self.opening:
            self._first.add(where)
        if called:
            self.recorder.call(self.model, where, skipped=False)
        if self.bypass_reason is not None or not self._may_hold(where, x):
            return
        stream = self.memory[where]
        if stream.kind is not None and stream.kind != signature(x):
            self.recorder.fallback(f"{self.model}/{where}", "shape, dtype or device changed: its history starts anew")
            self.memory.drop(where)
            stream = self.memory[where]
        if self.legacy is not None and (left := self.legacy.stream(where, signature(x))) is not None:
            stream = self._inherited[where] = left
        guess = self.strategy.forecast(stream, step)
        errors = squares(guess, x)
        if guess is not None and self.strategy.order and where.site == "model" and (last := stream.value("value")) is not None:
            self.signal("reuse", squares(last, x)[0])
        if against is not None:
            errors = torch.stack([errors[0], squares(None, against)[1]])
        self._pending.append((where, guess is not None, errors))
        if self.step.last:  # nobody will ask again
            stream.decoded.clear()
            return
        self._hold(where, x, step)
        if sibling is not None:
            self.guidance.observe(where, sibling, x, self.strategy, self.step)

    def local_attention(self, where: Where, q: Tensor, k: Tensor, v: Tensor, text_first: bool, full: Tensor | None = None) -> Tensor:
        """What an :class:`AttentionForecaster` computes of ``q, k, v [b, h, n, d]`` in place of the ``full`` attention, which is given
        at computed steps. The stream ``where`` holds the residual full - local."""
        strategy, name = cast(AttentionForecaster, self.strategy), f"far/{where}"
        errors = self.gate_state.state.get(name)
        if full is not None and errors is not None:
            self.recorder.far(self.model, where, (errors[0] / max(errors[1], 1e-30)) ** 0.5)
        scorer = self.scorer if isinstance(self.scorer, BlockScorer) else None
        tiled = self.memory.token_order is not None
        site = AttentionSite(self.memory[where], tiled, text_first, scorer, errors, partial(self.signal, name))
        return strategy.local_attention(site, q, k, v, full)

    def signal(self, name: str, values: Tensor) -> None:
        """Numbers on the device that the monitor wants beside the errors, as ``state[name]``; read once a step."""
        self._signals.setdefault(name, []).append(values.detach().flatten().float())

    def end(self) -> None:
        """The generation is over: nothing stays held."""
        if self.step is not None:
            self.settle()
        self.begin(self.bypass_reason)

    def _check_scorer(self, of_tokens: bool) -> None:
        """The report warns of a scorer that neither the monitor nor the strategy asks."""
        chooses = isinstance(self.strategy, AttentionForecaster) and isinstance(self.scorer, BlockScorer)
        if isinstance(self.monitor, TolerantMonitor) or chooses or (of_tokens and isinstance(self.strategy, ScoredForecaster)):
            return
        self.recorder.note(
            f"scorer {cast(StepScorer, self.scorer).name!r} changes nothing: monitor {self.monitor.name!r} decides without importance and "
            f"strategy {self.strategy.name!r} asks for no such scores; take monitor 'lyapunov', or leave the scorer out"
        )

    def _may_hold(self, where: Where, x: Tensor) -> bool:
        if where in self.exact:
            return False
        if x.requires_grad:
            why = "gradients are recorded: run under torch.no_grad() to let tqai forecast"
        elif not x.is_floating_point():
            why = f"its output is {x.dtype}, no float"
        elif where not in (self._first or ()) and not self.allow_new_streams:
            why = "it appeared after the first evaluation, so its history is unknown"
        else:
            return True
        self._give_up(where, why)
        return False

    def _hold(self, where: Where, x: Tensor, step: Step) -> None:
        stream = self.memory[where]
        score = self.scorer.score(tokens(x), step, stream) if self.scorer else None
        if isinstance(score, Tensor) and score.numel():
            self.signal("importance", score.float().mean())
        if self._renewed:  # the same sigma with other noise: a line from the last value to this one would follow the noise
            stream.parts = {}
        for history in filter(None, (stream, self._inherited.get(where)) if x.numel() else ()):
            history.hold({name: _finite(part) for name, part in self.strategy.plan(x, score, history, step).items()}, x, step)
        held = self.memory.count(where, self.strategy.order + 1)
        self.recorder.held(self.model, where, held, self.memory.exact)

    def settle(self) -> None:
        """Read the errors of the last computed step: one host sync a step, and only after computed ones."""
        if not self._pending or self.step is None:
            return
        sums, signals = self._read()
        gaps: dict[str, list[float]] = {}  # of video and audio apart, since one may be much the larger
        for (where, guessed, _), (g, s) in zip(self._pending, sums, strict=True):
            if not (g < float("inf") and s < float("inf")):  # NaN fails both
                self._give_up(where, "NaN or inf in its output")
                continue
            if guessed:
                pair = gaps.setdefault(where.kind if where.site == "model" else "", [0.0, 0.0])
                pair[0], pair[1] = pair[0] + g, pair[1] + s
                self.recorder.error(self.model, where, relative(g, s))
        error = max((relative(*pair) for pair in gaps.values()), default=None)
        self._entry["error"] = error
        scores = [v for v in signals.pop("importance", []) if v == v]
        self.importance = min(max(sum(scores) / len(scores), 0.0), 1.0) if scores else None
        if self.legacy is not None:
            self._judge(error)
        reuse, gap = sum(signals.pop("reuse", [])), sum(pair[0] for pair in gaps.values())
        self.gate_state.state["reuse"] = (error or 0.0) * relative(reuse, gap)  # error of the last value as a forecast
        self.gate_state.state.update(signals)
        self.monitor.observe(self.step, error, self.strategy.order, self.gate_state.state)
        self._pending.clear()
        self._signals.clear()

    def _fitting(self, where: Where, x: Tensor) -> Stream | None:
        """Another expert's stream, if it told ``x`` well enough to correct by it: a host sync, once a generation and branch."""
        step, legacy = cast(Step, self.step), cast(Legacy, self.legacy)
        stream = legacy.stream(where, signature(x)) if self.skipped_steps else None
        guess = None if stream is None else self.strategy.forecast(stream, step)
        if stream is None or guess is None:
            return None
        error = relative(*squares(guess, x).tolist())
        return stream if self.monitor.fits(step, error, self.strategy.order, dict(legacy.state)) else None

    def _judge(self, error: float | None) -> None:
        """The first step was computed: another expert's history goes on where it told this step's outputs well enough."""
        legacy, inherited, step = self.legacy, self._inherited, cast(Step, self.step)
        self.legacy, self._inherited = None, {}
        fits = legacy is not None and error is not None and self.monitor.fits(step, error, self.strategy.order, dict(legacy.state))
        self._entry["why"] = f"the other expert's history {'fits' if fits else 'does not fit'}"
        if fits and legacy is not None:
            self.gate_state.state = {**legacy.state, "fresh_noise": self.gate_state.state["fresh_noise"]}
            self.monitor.decide(step, self.importance, self.strategy.order, self.gate_state.state)  # it counts this step too
            for where, stream in inherited.items():
                if where in self.memory.streams:
                    self.memory.put(where, stream, self.strategy.order + 1)

    def _read(self) -> tuple[list[tuple[float, float]], dict[str, list[float]]]:
        """The squares of all streams and the signals, in one transfer, the same on every rank: squares summed, signals averaged."""
        device = self._pending[0][2].device
        names = list(self._signals)
        parts = [torch.stack([s.to(device) for _, _, s in self._pending]).flatten().float()]
        parts += [torch.cat(self._signals[name]).to(device) for name in names]
        *flat, ranks = self.agree(torch.cat([*parts, torch.ones(1, device=device)])).tolist()
        at = 2 * len(self._pending)
        pairs, signals = list(zip(flat[:at:2], flat[1:at:2], strict=True)), {}
        for name, part in zip(names, parts[1:], strict=True):
            signals[name] = [v if name == "reuse" else v / ranks for v in flat[at : at + len(part)]]  # reuse: squares too
            at += len(part)
        return pairs, signals

    def _give_up(self, where: Where, why: str) -> None:
        self.exact.add(where)
        self.memory.drop(where)
        self.recorder.fallback(f"{self.model}/{where}", why)


def _finite(part: Part) -> Part:
    """Codecs need finite numbers. A tensor that had others is found by its norm when the step settles, and never used."""
    return Part(torch.nan_to_num(part.tensor, posinf=0.0, neginf=0.0), part.bits)
