"""What happened, and the recorder that every flow of a handle writes to."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .types import Decision, Step, Where

DECISIONS = ("step", "sigma", "action", "estimate", "error", "why")


@dataclass
class Report:
    """The last generation (or the one under way), the same keys for every door.

    ``calls`` are model calls asked for by the host, ``calls_half`` those computed at half the height and width, ``evaluations`` sampler
    steps, ``bytes_exact`` what fp16 copies of the held tensors would take at the peak, ``seconds_cpu`` CPU time of the process in it.
    """

    calls: int = 0
    calls_skipped: int = 0
    evaluations: int = 0
    decisions: list[dict[str, Any]] = field(default_factory=list)
    bytes_held_peak: int = 0
    bytes_exact: int = 0
    seconds_cpu: float = 0.0
    per_site: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[dict[str, str]] = field(default_factory=list)
    calls_half: int = 0

    def to_dict(self) -> dict[str, Any]:
        return _plain(vars(self))  # type: ignore[no-any-return]

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def fall_back(self, where: str, why: str) -> None:
        """Something is computed or held exactly, and why: told once."""
        entry = {"where": where, "why": why}
        if entry not in self.fallbacks:
            self.fallbacks.append(entry)

    def worst(self, name: str) -> float | None:
        """The largest figure of this name over all sites, None where no site has one."""
        return max((row[name] for row in self.per_site.values() if row.get(name) is not None), default=None)

    def rows(self) -> list[list[str]]:
        """The decisions as cells of a table under ``DECISIONS``."""
        figures = lambda d: [_figure(d["error_estimate"]), _figure(d["error"])]  # noqa: E731
        return [[str(d["step"]), _figure(d["sigma"]), d["action"], *figures(d), d["why"]] for d in self.decisions]

    def to_markdown(self) -> str:
        share = self.calls_skipped / self.calls if self.calls else 0.0
        lines = [
            "| evaluations | calls | skipped | held at the peak | as fp16 copies | CPU |",
            "|---|---|---|---|---|---|",
            f"| {self.evaluations} | {self.calls} | {self.calls_skipped} ({share:.0%}) | {self.bytes_held_peak:,} B "
            f"| {self.bytes_exact:,} B | {self.seconds_cpu:.2f} s |",
        ]
        if self.calls_half:
            lines.append(f"\n{self.calls_half} calls at half the height and width")
        if self.decisions:
            lines += ["", *(f"| {' | '.join(cells)} |" for cells in (DECISIONS, ["---"] * len(DECISIONS), *self.rows()))]
        lines += self._caches()
        judged = {site: row["far"] for site, row in self.per_site.items() if "far" in row}
        if worse := [f"{site} ({ratio:.2f})" for site, ratio in judged.items() if ratio > 1]:
            lines.append(f"\nfar field: off in {len(worse)} of {len(judged)} attentions, where it errs more than none: {', '.join(worse)}")
        lines += [f"\nwarning: {text}" for text in self.warnings]
        lines += [f"\nexact: {f['where']}: {f['why']}" for f in self.fallbacks]
        return "\n".join(lines) + "\n"

    def _caches(self) -> list[str]:
        """What packed caches hold in all layers together, and the worst layer's errors."""
        rows = [row for row in self.per_site.values() if row.get("bits_held")]
        if not rows:
            return []
        held = sum(row["bytes_held"] for row in rows)
        exact = sum(16 * row["bytes_held"] / row["bits_held"] for row in rows)
        errors = ["" if error is None else f"{100 * error**0.5:.2g} %" for error in (self.worst("nmse_k"), self.worst("nmse_v"))]
        return [
            "",
            "| packed layers | bytes | in bf16 | bits a number | error of keys | error of values |",
            "|---|---|---|---|---|---|",
            f"| {len(rows)} | {held:,} | {exact:,.0f} | {16 * held / exact:.2f} | {' | '.join(errors)} |",
            "\nerror: what packing changed against what is kept, root of the mean squares, in the worst layer",
        ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


AGAIN = 0.5  # seconds of wall time after which a running report looks at the clock of the CPU again


class Recorder:
    """Collects one generation. ``held()`` gives the bytes held right now by everything that belongs to the handle."""

    def __init__(self, held: Callable[[], int]) -> None:
        self._held = held
        self.running = False
        self.report = Report(warnings=["nothing has run yet"])

    def begin(self) -> None:
        self.report = Report()
        self.running = True
        self._clock, self._due = time.process_time(), time.perf_counter() + AGAIN
        self._why: Counter[str] = Counter()
        self._error = ""

    def decision(self, model: str, step: Step, decision: Decision) -> dict[str, Any]:
        self.report.evaluations += 1
        if (now := time.perf_counter()) > self._due:  # the clock of the CPU sums over all threads: it costs more than a decision
            self._due, self.report.seconds_cpu = now + AGAIN, time.process_time() - self._clock
        self._why[decision.why] += decision.compute
        entry = {
            "step": step.index, "sigma": step.sigma, "action": "compute" if decision.compute else "forecast",
            "error_estimate": decision.error_estimate, "error": None, "why": decision.why, "model": model, "tolerance": decision.tolerance,
        }  # fmt: skip
        self.report.decisions.append(entry)
        return entry

    def call(self, model: str, where: Where, skipped: bool) -> None:
        site = self._site(model, where)
        self.report.calls += 1
        self.report.calls_skipped += skipped
        site["calls"] += 1
        site["skipped"] += skipped

    def held(self, model: str, where: Where, stream_bytes: int, exact: int) -> None:
        """After every store: the peak is walked, not computed."""
        site = self._site(model, where)
        site["bytes_held_peak"] = max(site["bytes_held_peak"], stream_bytes)
        self.report.bytes_held_peak = max(self.report.bytes_held_peak, self._held())
        self.report.bytes_exact = max(self.report.bytes_exact, exact)

    def error(self, model: str, where: Where, error: float) -> None:
        site = self._site(model, where)
        site["errors"] = site.get("errors", 0) + 1
        site["error_mean"] = site["error_mean"] + (error - site["error_mean"]) / site["errors"]

    def far(self, model: str, where: Where, ratio: float) -> None:
        """The error of a sparse attention with its far field over the one without: off where it is above 1."""
        self._site(model, where)["far"] = ratio

    def fallback(self, where: str, why: str) -> None:
        self.report.fall_back(where, why)

    def note(self, text: str) -> bool:
        """A line of the report's warnings; False if it is there already."""
        new = text not in self.report.warnings
        self.report.warnings += [text] * new
        return new

    def warn(self, text: str) -> None:
        """The same, and a Python warning."""
        if self.note(text):
            warnings.warn(f"tqai: {text}", UserWarning, stacklevel=4)

    def end(self) -> None:
        if not self.running:
            return
        self.running = False
        self.report.seconds_cpu = time.process_time() - self._clock
        for site in self.report.per_site.values():
            site.pop("errors", None)
        alone = self.report.evaluations == 1 and not self.report.fallbacks  # a call that fills a cache before the loop
        if self.report.calls and not (self.report.calls_skipped or self.report.calls_half or alone):
            reasons = [f["why"] for f in self.report.fallbacks] or [why for why, _ in self._why.most_common(3)]
            self.warn(f"nothing was skipped in {self.report.evaluations} evaluations: {'; '.join(reasons)}")

    def _site(self, model: str, where: Where) -> dict[str, Any]:
        empty = {"calls": 0, "skipped": 0, "bytes_held_peak": 0, "error_mean": 0.0}
        return self.report.per_site.setdefault(f"{model}/{where}", empty)


def dumps(result: Any) -> str:
    """JSON without NaN or inf: null stands for them."""

    def finite(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(_plain(result, finite), indent=1, allow_nan=False)


def _plain(thing: Any, leaf: Callable[[Any], Any] = lambda x: x) -> Any:
    """Plain data that shares nothing with ``thing``; ``dataclasses.asdict`` takes so long that a run of few small steps shows it."""
    if isinstance(thing, dict):
        return {key: _plain(value, leaf) for key, value in thing.items()}
    return [_plain(value, leaf) for value in thing] if isinstance(thing, (list, tuple)) else leaf(thing)
