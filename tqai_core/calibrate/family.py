"""``tqai tune --family``: the tolerances of a model that no file of this package tunes, for the three presets.

A ladder of tolerances is run until as few steps are computed as with preset ``fast``. Each preset takes the strictest tolerance that
computes no more steps than it does on the tuned families, unless the default is no worse in anything on seeds that the ladder did not see.
"""

from __future__ import annotations

from itertools import accumulate

from ..config import PRESETS, TAUS, Config
from ..errors import TqaiError
from ..hosts.calibration_targets import Diffusion
from ..progress import Progress, silent
from .tune import CHOICE, PROOF, SEEDS, Bench, Row

STEPS = 24  # sampler steps at which the cost of a preset is defined; a tolerance serves every number of steps
COMPUTED = {"quality": 14.5, "balanced": 12.5, "fast": 11.5}  # the most of these steps that a preset computes, on average
LADDER = (0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.11, 0.13, 0.16)


def measure(target: Diffusion, name: str, progress: Progress = silent) -> Row:
    """The entry of the target's class as plain data: what ``families/entry.py`` reads from a file. TqaiError where nothing is forecast."""
    pipe, model = type(target.pipe).__name__, type(target.model)
    if target.steps != STEPS:
        raise TqaiError(f"steps={target.steps}: the cost of a preset is defined at {STEPS} steps: give these")
    default = {which: TAUS[which].get(target.family.name, min(TAUS[which].values())) for which in PRESETS}
    report = target.run(SEEDS[0], _config(LADDER[-1]))[2]
    if not report.calls_skipped:
        why = "; ".join(report.warnings) or "its outputs change too much"
        raise TqaiError(f"{pipe}: nothing is forecast ({why}), so that no tolerance can be found: leave --family out")
    bench, kept, proof = Bench(target), [], {}
    ladder: dict[float, float] = {}  # tolerance -> steps computed on average
    for i, tau in enumerate(LADDER):
        progress(f"tolerance {tau:g}", 0.6 * i / len(LADDER))
        ladder[tau] = bench.measure(_config(tau), SEEDS + CHOICE)["calls"] * STEPS
        if ladder[tau] <= min(COMPUTED.values()):
            break
    for i, which in enumerate(PRESETS):
        progress(f"{which} on unseen seeds", 0.6 + 0.4 * i / len(PRESETS))
        # a model that is hard to forecast does not get a looser tolerance than the default
        tau = next((tau for tau, computed in ladder.items() if computed <= COMPUTED[which]), default[which])
        tried = {name: bench.measure(_config(t), PROOF) for name, t in (("default", default[which]), ("found", tau))}
        loses = all(tried["default"][what] <= tried["found"][what] for what in ("error", "calls"))
        kept.append(default[which] if loses else tau)
        proof[which] = {"tau": tau, **tried}
    listed = [", ".join(map(str, seeds)) for seeds in (SEEDS + CHOICE, PROOF)]
    return {
        "format": "tqai-family", "version": 1, "name": name, "title": pipe, "classes": [f"{model.__module__}:{model.__qualname__}"],
        "levels": ["model"], "tolerances": dict(zip(PRESETS, accumulate(kept, max), strict=True)),  # no faster preset is the stricter one
        "measured": f"{STEPS} steps of {pipe}; tolerances chosen by the share of steps computed (calls) on seeds {listed[0]}, tried beside "
        f"the default ones on seeds {listed[1]}; error is the NMSE to the exact run", "proof": proof,
    }  # fmt: skip


def _config(tau: float) -> Config:
    return Config(monitor={"name": "lyapunov", "tau": tau})


def tables_of(entry: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows): each preset with the tolerance found and with the default one."""
    head = ["preset", "tau written", "tau found", "error e-4", "calls", "error e-4, default", "calls, default"]
    figures = lambda row: [f"{row['error'] * 1e4:.3f}", f"{row['calls']:.2f}"]  # noqa: E731
    rows = [
        [which, f"{entry['tolerances'][which]:g}", f"{tried['tau']:g}", *figures(tried["found"]), *figures(tried["default"])]
        for which, tried in entry["proof"].items()
    ]
    return [(f"{entry['title']}, the tolerance found and the default on seeds that chose neither", head, rows)]
