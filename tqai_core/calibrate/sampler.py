"""The calibrated sampler: a few numbers a step, fitted to a fine run of the same model, in a file tied to that model.

``calibrate`` makes one or refuses: a sampler that does not beat the best stock solver on seeds it has not seen is not
made. Prior art is named in multistep.py; the recipe here is its closed-form, gradient-free relative.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import TqaiError
from ..families import FAMILIES
from ..files import checked, read_json, write_text
from ..metrics import nmse
from ..modelhash import model_hash, signs
from ..progress import Progress, silent
from .multistep import TERMS, BatchBarrier, Fit, Multistep, RecordingSolver, equidistributed, grid

FORMAT, VERSION = "tqai-sampler", 1
REFERENCE_CALLS = 100  # calls of the fine run; 240 at the same shift change its end by a few hundredths of a sampler's error
REFERENCE_SHIFT = 2.0
SHIFTS = (1.0, 2.0, 3.0)  # grids that the stock solvers may take
MARGIN = 0.75  # of the best stock solver's error: a smaller gain may be chance on a few seeds
NEAR = 1.25  # a guidance within this factor of the calibrated one needs no proof of its own
STOCK = ("ab2", "unipc", "dpm++")
AGAIN = "calibrate again"
ENTRIES = tuple(dict.fromkeys(host.entry for f in FAMILIES.values() for host in (f.diffusers, f.comfyui) if host and host.entry))
Solver = TypeVar("Solver", bound=Multistep)


@dataclass(frozen=True)
class CalibratedSampler:
    """What a file holds. ``nodes`` are the sigmas of the model calls, the final 0 is left out; ``theta`` ``[steps][4]``.

    ``models`` maps transformer names to :func:`tqai_core.modelhash.model_hash`, ``entry`` names the weights of the first layer,
    which keep their values in ComfyUI's checkpoints. ``guidance`` is {name, made, low, high, proved}: the pipeline's argument,
    its value while calibrating, the range allowed and the errors measured for it. ``difference`` is the JSON of the Config
    that forecasts cond - uncond, if the sampler was fitted under it. ``held_out`` has NMSE against the fine run on seeds not
    used for the fit: ``error`` and ``before_last`` (at the last node above 0), the same of the best stock solver, and the
    error of every grid that was tried.
    """

    models: dict[str, str]
    model_class: str
    entry: str | None
    grid: str
    nodes: tuple[float, ...]
    theta: tuple[tuple[float, ...], ...]
    form: str
    guidance: dict[str, Any]
    calls: float
    teacher: dict[str, float]
    seeds: dict[str, tuple[int, ...]]
    held_out: dict[str, Any]
    shape: tuple[int, ...]
    versions: dict[str, str]
    difference: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(float(s) for s in self.nodes))
        object.__setattr__(self, "theta", tuple(tuple(float(w) for w in row) for row in self.theta))
        ends = (*self.nodes, 0.0)
        if not self.nodes or ends[0] > 1.001 or any(not a > b for a, b in pairwise(ends)):
            raise TqaiError(f"sampler nodes {list(self.nodes)} do not fall from 1 towards 0: the file is damaged, calibrate again")
        weights = [w for row in self.theta for w in row]
        if len(self.theta) != self.steps or any(len(row) != TERMS for row in self.theta) or not all(map(math.isfinite, weights)):
            raise TqaiError(f"sampler has no {self.steps} x {TERMS} finite weights: the file is damaged, calibrate again")

    @property
    def steps(self) -> int:
        return len(self.nodes)

    def solver(self) -> Multistep:
        return Multistep((*self.nodes, 0.0), self.theta)

    def check(self, models: Mapping[str, nn.Module] | None = None, steps: int | None = None, guidance: float | None = None) -> None:
        """TqaiError unless the file was made for these transformers, this number of steps and a range with this guidance."""
        if steps is not None and steps != self.steps:
            raise TqaiError(
                f"{steps} steps asked, but this sampler was calibrated for {self.steps}: set num_inference_steps={self.steps}, or make "
                f"a file for {steps} (tqai calibrate --sampler --steps {steps})"
            )
        g = self.guidance
        if guidance is not None and not g["low"] <= guidance <= g["high"]:
            raise TqaiError(
                f"{g['name']}={guidance:g} asked, but this sampler was calibrated at {g['made']:g} and is good for {g['low']:g} to "
                f"{g['high']:g}: stay in that range, or calibrate at {guidance:g}"
            )
        if models is not None and (found := {name: model_hash(module) for name, module in models.items()}) != self.models:
            raise TqaiError(
                f"this sampler was calibrated for {self.model_class} {self.models}, the model at hand is {found}: calibrate this "
                "model (tqai calibrate --sampler). Loaded LoRAs change a model; load or fuse them before calibrating, too"
            )

    def check_entry(self, module: nn.Module) -> bool:
        """For hosts whose models have other names: compare the first layer's weights alone. False where there is nothing
        to compare (quantised or unknown weights), ValueError where they differ."""
        found = entry_hash(module)
        if self.entry is None or found is None:
            return False
        if found != self.entry:
            raise TqaiError(
                f"this sampler was calibrated for a {self.model_class} with first-layer weights {self.entry}, the model at hand has "
                f"{found}: load the model it was made for, or calibrate this one (tqai calibrate --sampler)"
            )
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CalibratedSampler:
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise TqaiError("this is no calibrated sampler: make one with tqai calibrate --sampler")
        if data.get("version") != VERSION:
            raise TqaiError(
                f"sampler file version {data.get('version')!r}: this tqai reads {VERSION}; upgrade tqai-core or calibrate again"
            )
        content = {k: v for k, v in data.items() if k not in ("format", "version")}
        if missing := sorted(set(cls.__dataclass_fields__) - {"difference"} - set(content)):
            raise TqaiError(f"sampler file lacks {', '.join(missing)}: it is damaged, calibrate again")
        checked("Sampler", data, what="damaged sampler file", again=AGAIN)
        g = content["guidance"]
        if not g["low"] <= g["made"] <= g["high"]:
            raise TqaiError(f"sampler file: field 'guidance' allows {g['low']} to {g['high']}, without {g['made']}: {AGAIN}")
        if content.get("difference") is not None:
            Config.from_json(content["difference"])
        return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the file in one step: a stopped save leaves the old one."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CalibratedSampler:
        path = Path(path)
        if not path.is_file():
            raise TqaiError(f"no sampler file {str(path)!r}: make one with tqai calibrate --sampler -o {path}")
        return cls.from_dict(read_json(path, what="sampler file", again=AGAIN))


def guidance_range(name: str, made: float) -> dict[str, Any]:
    """The field ``guidance`` of a file: near the calibrated value, nothing proved beyond."""
    return {"name": name, "made": made, "low": made / NEAR, "high": made * NEAR, "proved": []}


def entry_hash(module: nn.Module) -> str | None:
    """16 hexadecimal digits of the signs of the first layer's weights, or None where they cannot be read.

    diffusers and ComfyUI name most layers differently and fuse some, but both keep the patch embedding as it was trained.
    """
    parameters = dict(module.named_parameters())
    for name in ENTRIES:
        x = parameters.get(name)
        if x is not None and x.device.type != "meta" and x.is_floating_point() and x.numel():
            return hashlib.sha256(json.dumps([x.numel()]).encode() + signs(x, 4096)).hexdigest()[:16]
    return None


class Model(Protocol):
    """What the calibrator asks of a host: runs of its own sampler loop with our solver in it."""

    tick: Callable[[float], None]  # called after each step with the share of the seeds that made it
    spent: float  # calls of the last run of ``solve``, 1 = all guidance branches of a step

    def solve(self, seeds: Sequence[int], make: Callable[[int, BatchBarrier], Solver]) -> list[Solver]:
        """One run a batch of seeds, with the solver that ``make`` gives to batch k; the solvers, at their ends."""
        ...

    def stock(self, name: str, shift: float, steps: int, seeds: Sequence[int]) -> list[tuple[float, Tensor, Tensor]]:
        """A solver of the host: (last sigma above 0, state there, final state) of every batch. ValueError if it has none."""
        ...

    def guided(self, guidance: float) -> AbstractContextManager[None]:
        """While the context lasts, runs take another guidance."""
        ...

    def header(self) -> dict[str, Any]:
        """models, model_class, entry, guidance, shape, versions and difference of the file."""
        ...


@dataclass(frozen=True)
class Reference:
    """Runs over some seeds, a batch each, whose states were recorded."""

    runs: list[RecordingSolver]

    def state(self, index: int) -> Tensor:
        """State number ``index`` of all samples, -1 is the result."""
        return torch.cat([run.states[index] for run in self.runs])

    @property
    def end(self) -> Tensor:
        return self.state(-1)

    def at(self, sigma: float) -> Tensor:
        return torch.cat([run.at(sigma) for run in self.runs])


def recorded(model: Model, seeds: Sequence[int], nodes: Sequence[float], theta: Any = None) -> Reference:
    """The calibrated step along ``nodes``, plain Adams-Bashforth 2 without ``theta``."""
    return Reference(model.solve(seeds, lambda k, barrier: RecordingSolver(nodes, theta)))


def reference(model: Model, seeds: Sequence[int], calls: int = REFERENCE_CALLS) -> Reference:
    """A fine run, whose result stands for the exact solution of the ODE."""
    return recorded(model, seeds, grid(calls, REFERENCE_SHIFT))


def fit(model: Model, seeds: Sequence[int], exact: Reference, nodes: Sequence[float], form: str) -> tuple[tuple[float, ...], ...]:
    """``theta`` on the fitted solver's own states. ``form="last"`` fits the step to 0 alone."""
    only = range(len(nodes) - 1) if form == "all" else (len(nodes) - 2,)
    make = lambda k, barrier: Fit(nodes, exact.runs[k].at, lambda part: barrier.total(k, part), only)  # noqa: E731
    return tuple(model.solve(seeds, make)[0].fitted)


def errors(model: Model, seeds: Sequence[int], exact: Reference, nodes: Sequence[float], theta: Any = None) -> dict[str, float]:
    """NMSE to ``exact`` at the end and at the last node above 0."""
    run = recorded(model, seeds, nodes, theta)
    return _against(exact, len(seeds), run.end, run.state(-2), nodes[-2])


def stock_errors(model: Model, name: str, shift: float, steps: int, seeds: Sequence[int], exact: Reference) -> dict[str, float]:
    """The same of a stock solver."""
    if name == "ab2":
        return errors(model, seeds, exact, grid(steps, shift))
    sigmas, before, end = zip(*model.stock(name, shift, steps, seeds), strict=True)
    return _against(exact, len(seeds), torch.cat(end), torch.cat(before), sigmas[0])


def _against(exact: Reference, count: int, end: Tensor, before: Tensor, sigma: float) -> dict[str, float]:
    """Errors over the first ``count`` samples; a seed is a sample."""
    return {"error": nmse(end, exact.end[:count]), "before_last": nmse(before, exact.at(sigma)[:count])}


def calibrate(
    model: Model,
    steps: int = 12,
    *,
    seeds: Sequence[int] = (7700, 7701, 7702, 7703),
    held_out: Sequence[int] = (8800, 8801, 8802),
    form: str = "all",
    shift: float | None = None,
    reference_calls: int = REFERENCE_CALLS,
    tune: int = 2,
    stock: Sequence[str] = STOCK,
    references: tuple[Reference, Reference] | None = None,
    progress: Progress = silent,
) -> CalibratedSampler:
    """Fit on ``seeds``, choose the grid and prove it on ``held_out`` against the best of ``stock``.

    ``form="last"`` fits the last step alone, on the grid of ``shift``: it costs no call and improves the step at which every
    solver errs most. ``shift`` is the user's grid; without one the best of the stock grids takes its place. The first ``tune``
    seeds choose each stock solver's shift. ``references`` are fine runs of both kinds of seeds made before. Raises TqaiError
    where the sampler does not win by ``MARGIN``.
    """
    seeds, held_out = list(seeds), list(held_out)
    check_settings(steps, seeds, held_out, form, reference_calls)
    few, count = seeds[:tune], len(seeds) + len(held_out)
    coarse = len(stock) * (len(SHIFTS) * len(few) + len(held_out)) + (3 if form == "all" else 1) * count
    clock = Clock(reference_calls * count + steps * coarse, progress)
    model.tick = clock.tick
    clock.stage(f"reference: {reference_calls} calls on {len(seeds)} seeds", len(seeds))
    known = references[0] if references else reference(model, seeds, reference_calls)
    clock.stage("stock solvers: their best grid", len(few))
    tuned: dict[str, float] = {}
    for name in stock:
        found = {s: stock_errors(model, name, s, steps, few, known)["error"] for s in SHIFTS}
        tuned[name] = min(found, key=found.__getitem__)
    clock.stage(f"reference: {reference_calls} calls on {len(held_out)} seeds that the fit does not see", len(held_out))
    unseen = references[1] if references else reference(model, held_out, reference_calls)
    clock.stage("stock solvers on these", len(held_out))
    rivals: list[dict[str, Any]] = [{"name": n, "shift": s, **stock_errors(model, n, s, steps, held_out, unseen)} for n, s in tuned.items()]
    best = min(rivals, key=lambda r: r["error"])
    clock.stage("the sampler", count / 2)
    fitted = {}
    for name, nodes in _grids(known, steps, form, tuned.get("ab2", best["shift"]) if shift is None else shift).items():
        theta = fit(model, seeds, known, nodes, form)
        fitted[name] = errors(model, held_out, unseen, nodes, theta), nodes, theta
    calls = model.spent
    chosen = min(fitted, key=lambda n: fitted[n][0]["error"])
    figures, nodes, theta = fitted[chosen]
    if form == "last":  # its rival is the same solver on the same grid
        best = {"name": "ab2", "shift": shift or tuned["ab2"], **errors(model, held_out, unseen, nodes)}
    if not figures["error"] <= MARGIN * best["error"]:
        raise TqaiError(
            f"no file was made: with {steps} steps the calibrated sampler has NMSE {figures['error']:.3g} on held-out seeds, "
            f"{best['name']} at shift {best['shift']:g} has {best['error']:.3g}, and less than a quarter below it is not worth a file. "
            "Use that solver, or calibrate with more steps or more seeds"
        )
    held = {**figures, "stock": best, "grids": {name: made[0]["error"] for name, made in fitted.items()}}
    return CalibratedSampler(
        **model.header(), grid=chosen, nodes=nodes[:-1], theta=theta, form=form, calls=calls, held_out=held,
        teacher={"calls": reference_calls, "shift": REFERENCE_SHIFT}, seeds={"fit": tuple(seeds), "held_out": tuple(held_out)},
    )  # fmt: skip


def extend_guidance_range(
    model: Model, sampler: CalibratedSampler, guidance: float, samples: int = 2, progress: Progress = silent
) -> CalibratedSampler:
    """The sampler, allowed up (or down) to ``guidance`` if it wins there, too, against the stock solver it was proved
    against; unchanged if it does not."""
    seeds = list(sampler.seeds["held_out"])[:samples]
    calls, rival = int(sampler.teacher["calls"]), sampler.held_out["stock"]
    clock = Clock((calls + 2 * sampler.steps) * len(seeds), progress)
    model.tick = clock.tick
    clock.stage(f"guidance {guidance:g}", len(seeds))
    with model.guided(guidance):
        exact = reference(model, seeds, calls)
        ours = errors(model, seeds, exact, (*sampler.nodes, 0.0), sampler.theta)["error"]
        theirs = stock_errors(model, rival["name"], rival["shift"], sampler.steps, seeds, exact)["error"]
    g = dict(sampler.guidance)
    g["proved"] = [*g["proved"], {"at": guidance, "error": ours, "stock": theirs}]
    if ours <= MARGIN * theirs:
        g["low"], g["high"] = min(g["low"], guidance), max(g["high"], guidance)
    elif g["low"] < guidance < g["high"]:
        g["low" if guidance < g["made"] else "high"] = g["made"]
    return replace(sampler, guidance=g)


class Clock:
    """How much of a calibration is done, counted in samples that went through the model."""

    def __init__(self, total: float, progress: Progress) -> None:
        self.total, self.progress, self.done = total, progress, 0.0

    def stage(self, text: str, samples: float) -> None:
        self.text, self.samples = text, samples
        self.progress(text, min(self.done / self.total, 1.0))

    def tick(self, share: float) -> None:
        """A batch of ``share`` of the stage's samples has made a step."""
        self.done += self.samples * share
        self.progress(self.text, min(self.done / self.total, 1.0))


def _grids(exact: Reference, steps: int, form: str, shift: float) -> dict[str, tuple[float, ...]]:
    """The grids to try: nodes at equal shares of the velocity's change, the stock one, and half-way between, which is less
    dense at the end where the first has most of its nodes."""
    stock = {f"shift {shift:g}": grid(steps, shift)}
    if form == "last":
        return stock
    change = [sum(parts) for parts in zip(*(run.change for run in exact.runs), strict=True)]
    equal = equidistributed(exact.runs[0].nodes, change, steps)
    between = tuple((a + b) / 2 for a, b in zip(equal, grid(steps, REFERENCE_SHIFT), strict=True))
    return {"equidistributed": equal, "half-way": between, **stock}


def check_settings(steps: int, seeds: Sequence[int], held_out: Sequence[int], form: str, calls: int) -> None:
    """TqaiError for what no sampler can be made from."""
    if form not in ("all", "last"):
        raise TqaiError(f"form={form!r}: give 'all' (every step) or 'last' (the step to 0 alone)")
    if steps < 3:
        raise TqaiError(f"{steps} steps: a calibrated sampler takes 3 or more")
    if calls < 4 * steps:
        raise TqaiError(f"a reference of {calls} calls is too coarse for {steps} steps: give {max(4 * steps, REFERENCE_CALLS)} or more")
    if not seeds or not held_out or set(seeds) & set(held_out):
        raise TqaiError(f"seeds {list(seeds)} and held-out seeds {list(held_out)}: give at least one each, and none twice")
