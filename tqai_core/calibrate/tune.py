"""``tqai tune``: search over pipelines, each measured against the exact run, and a proof on seeds the search never saw.

NSGA-II (Deb et al. 2002) or TPE (Bergstra et al. 2011) of Optuna over the stages of a :class:`Config`. Every candidate is a
valid pipeline by construction: a stage's own options exist only where the stage is chosen. Two objectives, error and what
the budget is about; what exceeds the budget is infeasible.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from torch import Tensor

from ..config import Config, preset
from ..errors import TqaiError
from ..families import FAMILIES, family_of
from ..files import checked
from ..hosts.calibration_targets import Diffusion
from ..modelhash import model_hash
from ..progress import Progress, silent
from ..registry import ROLES
from ..roles import STEPS

SEEDS, CHOICE, PROOF = (100, 101), (102, 103), (104, 105, 106)  # of the search, of the pick among its best, of the proof
BUDGETS = ("calls", "bytes", "time")
FINALISTS = 3
OTHER = "give a study of tqai tune, or the name of a new file"
MOST = 64_000_000  # bytes of a study; a trial takes two thousand
TABLES = {"studies", "trials", "study_user_attributes", "trial_user_attributes", "trial_values", "trial_params", "version_info"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What a pipeline may cost: ``calls`` and ``time`` as a share of the exact run, ``bytes`` held at the peak."""

    what: str
    limit: float

    @staticmethod
    def parse(text: str) -> Budget:
        """``"calls=0.5"``. ValueError says what is wrong with it."""
        what, _, value = text.partition("=")
        try:
            made = Budget(what.strip(), float(value))
        except ValueError:
            raise TqaiError(f"budget {text!r}: give calls=0.5, time=0.6 or bytes=100000") from None
        if made.what not in BUDGETS or not made.limit > 0 or (made.what != "bytes" and made.limit > 1):
            raise TqaiError(f"budget {text!r}: give calls= or time= with a share of the exact run from 0 to 1, or bytes= held at the peak")
        return made


class Bench:
    """Runs pipelines on one target and remembers exact runs."""

    def __init__(self, target: Diffusion) -> None:
        self.target = target
        self._exact: dict[int, tuple[Tensor, float]] = {}

    def measure(self, config: Config, seeds: Sequence[int]) -> Row:
        """Means over ``seeds``: error (NMSE to the exact run), share of calls and CPU time, bytes held."""
        rows = []
        for seed in seeds:
            if seed not in self._exact:
                self._exact[seed] = self.target.run(seed)[:2]
            exact, seconds = self._exact[seed]
            out, spent, report = self.target.run(seed, config)
            error = self.target.damage(out, exact) / self.target.size(exact)
            calls = (report.calls - report.calls_skipped) / max(report.calls, 1)
            rows.append((error, calls, report.bytes_held_peak, spent / seconds))
        return dict(zip(("error", "calls", "bytes", "time"), map(mean, zip(*rows, strict=True)), strict=True))


def spread(first: int, last: int, power: float, count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` evaluations: the ``first`` and ``last`` ones, and between them a grid that ``power`` over 1 makes
    dense where it begins, under 1 where it ends."""
    middle = max(count - first - last, 0)
    low, high = first - 1, total - last
    inner = {round(low + (high - low) * ((i + 1) / (middle + 1)) ** power) for i in range(middle)}
    return tuple(sorted({*range(first), *range(high, total)} | inner))


def candidate(trial: Any, steps: int, budget: Budget, levels: Sequence[str], fragile: Sequence[int]) -> Config:
    """The pipeline of a trial."""
    level = trial.suggest_categorical("level", list(levels)) if len(levels) > 1 else levels[0]
    strategy: Row = {"name": trial.suggest_categorical("strategy", ["delta2", "delta", "tiered"])}
    if strategy["name"] != "delta":
        strategy["slope_bits"] = trial.suggest_int("slope_bits", 2, 8)
    strategy["cfg"] = trial.suggest_categorical("cfg", ["none", "difference"])
    name = trial.suggest_categorical("monitor", ["schedule", "lyapunov", "fixed", "stability"])
    monitor: Row = {"name": name}
    scorer = None
    if name == "schedule":
        share = budget.limit if budget.what in ("calls", "time") else 0.5
        most = max(round(share * steps), 4)
        if strategy["cfg"] == "difference":  # half of the computed steps forecast a branch
            most = min(round(most * 1.3), steps - 1)
        count = trial.suggest_int(f"count_{strategy['cfg']}", max(most - 2, 4), most)
        shape = (trial.suggest_int("first", 1, 3), trial.suggest_int("last", 1, 4), trial.suggest_float("power", 0.6, 1.6))
        monitor |= {"steps": spread(*shape, count, steps), "total": steps}
    else:
        scorer = trial.suggest_categorical("scorer", ["none", "snr", "change", "palm", "sheaf"])
        warmup = trial.suggest_int("warmup", 1, 3)
        if name == "fixed":
            monitor |= {"interval": trial.suggest_float("interval", 1.2, 4.0), "warmup": warmup}
        else:
            low, high = (0.02, 0.3) if name == "lyapunov" else (0.001, 0.1)
            monitor |= {"tau": trial.suggest_float(f"tau_{name}", low, high, log=True), "warmup": warmup}
            monitor["max_gap"] = trial.suggest_int("max_gap", 1, 8)
        monitor["min_steps"] = min(steps, 16)
    codec = trial.suggest_categorical("codec", ["turbo:bits=8", "turbo:bits=7", "turbo:bits=6", "trellis:bits=6", "exact"])
    skip: tuple[int, ...] = ()
    if level != "model" and fragile:
        skip = tuple(fragile[: trial.suggest_int("protected", 0, min(len(fragile), 2))])
    return Config(
        scorer=None if scorer in (None, "none") else scorer, strategy=strategy, monitor=monitor, codec=codec, level=level, skip_layers=skip
    )


def fragile_layers(bench: Bench, seed: int, progress: Progress = silent) -> list[tuple[int, float]]:
    """(layer, error) of forecasting every second step of one layer alone, worst first: what to propose as ``skip_layers``."""
    from ..hosts.attention_interceptor import blocks_of

    depth = len(blocks_of(bench.target.model))
    found = []
    for layer in range(depth):
        others = tuple(i for i in range(depth) if i != layer)
        config = Config(level="block", monitor={"name": "fixed", "interval": 2.0, "min_steps": 1}, skip_layers=others)
        found.append((layer, bench.measure(config, [seed])["error"]))
        progress(f"layer {layer} alone", (layer + 1) / depth)
    return sorted(found, key=lambda pair: -pair[1])


def proposed(layers: Sequence[tuple[int, float]]) -> tuple[int, ...]:
    """Layers that do more than twice the median's damage, at most a quarter of them (one at least may be)."""
    if len(layers) < 2:
        return ()
    middle = sorted(error for _, error in layers)[len(layers) // 2]
    return tuple(layer for layer, error in layers[: max(len(layers) // 4, 1)] if error > 2 * middle)


def tune(
    target: Diffusion,
    budget: Budget,
    study_file: Path,
    trials: int = 40,
    sampler: str = "nsga2",
    levels: Sequence[str] = ("model",),
    progress: Progress = silent,
) -> Row:
    """Search until ``trials`` are finished, those of a resumed study counted, then choose and prove. Plain data."""
    if trials < 1:
        raise TqaiError(f"trials={trials}: give 1 or more")
    if unknown := [level for level in levels if level not in STEPS]:
        raise TqaiError(f"levels {unknown}: give {', '.join(STEPS)}")
    settings = {
        "model": model_hash(target.model), "class": type(target.model).__name__, "steps": target.steps, "levels": list(levels),
        "budget": [budget.what, budget.limit], "seeds": list(SEEDS),
    }  # fmt: skip
    for level in levels:
        family_of(target.model, level)  # a class whose blocks no file knows has level model alone
    study = _open(study_file, sampler, settings)
    bench = Bench(target)
    layers: list[tuple[int, float]] = [tuple(pair) for pair in study.user_attrs.get("layers", [])]
    if not layers and "block" in getattr(target.family.diffusers, "levels", ()):
        layers = fragile_layers(bench, SEEDS[0], lambda text, share: progress(text, 0.0))
        study.set_user_attr("layers", layers)
    if not study.trials:
        for known in _known(target.steps, budget):
            study.enqueue_trial(known)
    finished = lambda study: sum(t.state.name == "COMPLETE" for t in study.trials)  # noqa: E731
    skip = proposed(layers)

    def objective(trial: Any) -> tuple[float, float]:
        config = candidate(trial, target.steps, budget, levels, skip)
        row = bench.measure(config, SEEDS)
        trial.set_user_attr("config", config.to_dict())
        trial.set_user_attr("row", row)
        trial.set_constraint(budget.what, row[budget.what] - budget.limit)
        return row["error"], row[budget.what]

    show = lambda study, trial: progress(f"{finished(study)} of {trials} trials", 0.9 * finished(study) / trials)  # noqa: E731
    study.optimize(objective, n_trials=max(trials - finished(study), 0), callbacks=[show])
    return _outcome(bench, study, budget, progress)


def _open(file: Path, sampler: str, settings: Row) -> Any:
    """The study in ``file``, new or resumed; TqaiError where it was begun with other settings."""
    optuna = _optuna()
    makers = {
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=12, seed=0),
        "tpe": lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=10, multivariate=True, group=True),
    }
    if sampler not in makers:
        raise TqaiError(f"sampler {sampler!r} is unknown; known: {', '.join(makers)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.stat().st_size:  # never changed unless it is ours
        load_study(file)
    study = optuna.create_study(
        storage=f"sqlite:///{file}", study_name="tqai", sampler=makers[sampler](), load_if_exists=True, directions=["minimize", "minimize"]
    )
    had = study.user_attrs.get("settings", settings)
    if had != settings:
        differing = ", ".join(f"{k}={had.get(k)!r}" for k in settings if had.get(k) != settings[k])
        raise TqaiError(f"study {file} was begun with other settings ({differing}): give the same ones, or another --study")
    study.set_user_attr("settings", settings)
    return study


def _outcome(bench: Bench, study: Any, budget: Budget, progress: Progress) -> Row:
    """The best on other seeds, and the proof on seeds that neither the search nor the choice saw."""
    found, family = summary(study), bench.target.family.name
    default = preset("balanced", family if family in FAMILIES else None)
    allowed = sorted((r for r in found["trials"] if r[budget.what] <= budget.limit), key=lambda r: r["error"])
    unique = list({json.dumps(r["config"], sort_keys=True): r for r in reversed(allowed)}.values())[::-1][:FINALISTS]
    finals: list[tuple[float, Config]] = []
    for i, row in enumerate(unique):
        progress("the best on other seeds", 0.9 + 0.05 * i / FINALISTS)
        config = Config.from_dict(row["config"])
        chosen = bench.measure(config, CHOICE)
        if chosen[budget.what] <= budget.limit:
            finals.append((row["error"] + chosen["error"], config))
    best = min(finals, key=lambda pair: pair[0])[1] if finals else default
    progress("the proof on unseen seeds", 0.96)
    proof = {"default": bench.measure(default, PROOF), "tuned": bench.measure(best, PROOF)}
    fits = proof["default"][budget.what] <= budget.limit
    kept = best != default and (proof["tuned"]["error"] <= proof["default"]["error"] or not fits)
    return {
        **found, "proof_seeds": list(PROOF), "proof": proof, "kept": "tuned" if kept else "default", "tuned": best.to_dict(),
        "config": (best if kept else default).to_dict(), "default_fits": fits,
    }  # fmt: skip


def summary(study: Any) -> Row:
    """What a study holds, finished or not, as plain data."""
    settings, layers = study.user_attrs.get("settings", {}), study.user_attrs.get("layers", [])
    what, limit = settings.get("budget", ["calls", 0.5])
    rows = rows_of(study)
    return {
        "what": "study", "settings": settings, "budget": {"what": what, "limit": limit}, "trials": rows, "front": front(rows, what),
        "layers": [list(pair) for pair in layers], "skip_layers": list(proposed(layers)),
    }  # fmt: skip


def tables_of(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows): the Pareto front, layers, and the proof."""
    by_trial = {row["trial"]: row for row in found["trials"]}
    figures = lambda row: [f"{row['error'] * 1e4:.3f}", f"{row['calls']:.2f}", f"{row['bytes']:,.0f}", f"{row['time']:.2f}"]  # noqa: E731
    stages = lambda c: f"{c['level']}: " + " ".join(str(c[role]) for role in ROLES if c[role])  # noqa: E731
    head = ["error e-4", "calls", "bytes held", "time"]
    rows = [[str(n), *figures(by_trial[n]), stages(by_trial[n]["config"])] for n in found["front"]]
    out = [(f"Pareto front, error and {found['budget']['what']}", ["trial", *head, "pipeline"], rows)]
    layers = [[str(layer), f"{error * 1e4:.4f}"] for layer, error in found["layers"]]
    skip, unseen = (", ".join(map(str, found.get(name) or ())) for name in ("skip_layers", "proof_seeds"))
    out.append((f"Layers, each forecast alone; proposed as skip_layers: {skip or 'none'}", ["layer", "error e-4"], layers))
    if "proof" in found:
        title = f"Proof on seeds {unseen}, which the search never saw; written: {found['kept']}"
        out.append((title, ["pipeline", *head], [[name, *figures(row)] for name, row in found["proof"].items()]))
    return out


def rows_of(study: Any) -> list[Row]:
    """Finished trials."""
    done = [t for t in study.trials if t.values is not None and "row" in t.user_attrs]
    return [{"trial": t.number, "config": t.user_attrs["config"], **t.user_attrs["row"]} for t in done]


def front(rows: Sequence[Mapping[str, Any]], what: str) -> list[int]:
    """Numbers of the trials that no other beats in both error and cost, cheapest first."""
    best, out = float("inf"), []
    for row in sorted(rows, key=lambda r: (r[what], r["error"])):
        if row["error"] < best:
            best = row["error"]
            out.append(row["trial"])
    return out


def check_study_file(path: Path) -> None:
    """TqaiError unless ``path`` is a study, or no file yet, and Optuna is here."""
    _optuna()
    if path.exists() and path.stat().st_size:
        load_study(path)


def load_study(path: Path) -> Row:
    """What a study file holds, finished or not. TqaiError for a file that is no study."""
    if not path.is_file():
        raise TqaiError(f"study {path} is not there: tqai tune --study {path} makes it")
    _check_database(path)
    optuna = _optuna()
    storage = f"sqlite:///file:{quote(str(path.resolve()))}?mode=ro&uri=true"
    try:
        found = summary(optuna.load_study(study_name="tqai", storage=storage))
    except Exception as error:  # of Optuna, SQLAlchemy and json there are many; what they meet is a file that somebody else may have made
        raise TqaiError(f"{path} is no study of tqai tune ({type(error).__name__}): {OTHER}") from None
    return check_study(found, f"study {path}")


def _check_database(path: Path) -> None:
    """TqaiError unless ``path``, opened to be read alone, is a sound database with the tables of Optuna and nothing that acts."""
    if path.stat().st_size > MOST:
        raise TqaiError(f"study {path} is larger than {MOST:,} bytes, the most that one has: {OTHER}")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            database.execute("PRAGMA trusted_schema=OFF")
            kinds = dict(database.execute("SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
            sound = not set(kinds.values()) - {"table", "index"} and kinds.keys() >= TABLES
            sound = sound and database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise TqaiError(f"{path} is no study of tqai tune ({error}): {OTHER}") from None
    if not sound:
        raise TqaiError(f"{path} is no study of tqai tune, its tables are others or damaged: {OTHER}")


def check_study(found: Any, what: str) -> Row:
    """What a study file or a ``--json`` gave. TqaiError names the field that is wrong."""
    checked("Study", json.loads(json.dumps(found)) if isinstance(found, dict) else found, what=what, again=OTHER)
    for row in found["trials"]:
        row["config"] = Config.from_dict(row["config"]).to_dict()
    if not set(found["front"]) <= {row["trial"] for row in found["trials"]}:
        raise TqaiError(f"{what}: field 'front' names trials that are not there: {OTHER}")
    if "proof" in found and not {"proof_seeds", "kept"} <= found.keys():
        raise TqaiError(f"{what}: fields 'proof_seeds' and 'kept' go with 'proof': {OTHER}")
    for name in ("tuned", "config"):
        if found.get(name):
            Config.from_dict(found[name])
    return dict(found)


def _known(steps: int, budget: Budget) -> list[Row]:
    """Where the search begins: error control as the presets have it, and three schedules."""
    share = budget.limit if budget.what in ("calls", "time") else 0.5
    common = {"level": "model", "strategy": "delta2", "slope_bits": 3, "cfg": "none", "codec": "turbo:bits=8"}
    control = {"monitor": "lyapunov", "scorer": "none", "warmup": 3, "max_gap": 6}
    grid = {"monitor": "schedule", "count_none": max(round(share * steps), 4)}
    return [
        {**common, **control, "tau_lyapunov": 0.06},
        {**common, **grid, "first": 3, "last": 2, "power": 1.2, "slope_bits": 6},
        {**common, **grid, "first": 3, "last": 3, "power": 1.2, "slope_bits": 6},
        {**common, **grid, "first": 2, "last": 2, "power": 1.0, "slope_bits": 6},
    ]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise TqaiError("tuning needs Optuna: pip install 'tqai-core[tune]'") from None
    optuna.logging.set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
