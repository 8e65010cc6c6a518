"""``tqai bench dit --peers``: the step caches people use, beside tqai, on the same minis, seeds and schedule.

Every peer runs at a few settings of its own. A row is a median over the seeds; its error is taken against the exact run of
the same seed (24 Euler steps, shift 1) and its distance against the true ODE (240 calls of Adams-Bashforth 2 at shift 2). A
row that fails stays, with its reason; so does one that saves nothing. Beside the medians stand mean, sd and least PSNR of the single
pictures of all seeds, and for a method with a threshold whether threshold 0 is the exact run, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from tqai_core.config import PRESETS, preset
from tqai_core.metrics import nmse, psnr, ssim
from tqai_core.minis import names

from . import dit
from .harness import Mini, Row, Table, closing, each, machine, medians, one_thread, promises

STEPS = dit.STEPS
SAMPLES = {"flux": 6, "sd3": 6, "wan": 2, "photo": 2}
KINDS = tuple(SAMPLES)
CALIBRATION = (100, 101)  # seeds of MagCache's ratios
TAUS = (0.015, 0.02, 0.03, 0.13, 0.2)  # beside the presets: what tqai does at the peers' CPU times
ANCHOR = 5  # rows between two exact runs
CACHE_DIT = "not installed: pip install --no-deps cache-dit==1.5.3 pyyaml packaging"
# what it switches on (None: nothing) -> (undo, bytes held now)
Enable = Callable[[Mini], tuple[Callable[[], None], Callable[[], int]]]


@dataclass(frozen=True)
class Rival:
    """One row: a method at one setting."""

    peer: str
    setting: str
    enable: Enable | None = None
    helped: str = ""  # what the bench did for it that its pipeline does not
    steps: int = STEPS
    solver: str = "euler"
    zero: Enable | None = None  # the same with its threshold at 0; None: it has none


@dataclass
class Result:
    """One generation. ``calls`` and ``attention`` are the share of blocks and attention modules that ran, in steps."""

    latents: Tensor
    calls: float
    attention: float
    seconds: float
    held: int


@dataclass
class Meter:
    """Counts what really ran: rows (batch entries) through each block's feed-forward and each attention's query projection."""

    rows: dict[str, int] = field(default_factory=lambda: {"blocks": 0, "attention": 0})

    def attach(self, model: Any) -> Meter:
        for name, module in model.named_modules():
            what = "attention" if name.endswith(".to_q") else "blocks" if name.endswith((".ff", ".ffn", ".proj_mlp")) else None
            if what:
                module.register_forward_pre_hook(lambda _, args, what=what: self._count(what, args))
        return self

    def _count(self, what: str, args: Any) -> None:
        self.rows[what] += args[0].shape[0]


class Track:
    """A mini with a meter on it."""

    def __init__(self, kind: str, steps: int = STEPS, samples: int | None = None) -> None:
        self.mini, self.steps, self.samples = Mini(kind), steps, samples or SAMPLES[kind]
        self.meter = Meter().attach(self.mini.pipe.transformer)
        self.whole: dict[str, float] = {}

    def labels(self, seed: int) -> list[int]:
        return dit.labels_of(self.mini.kind, seed, self.samples)

    def exact(self, seed: int, steps: int | None = None) -> Result:
        return self.run(Rival("exact", "", steps=steps or self.steps), seed)

    def run(self, rival: Rival, seed: int) -> Result:
        """Generate with ``rival`` switched on and undone after; whatever it raises comes out after the undo."""
        from tqai_core.hosts.diffusers import minis

        from . import dit_caches as peers

        mini = self.mini
        mini.schedule(rival.solver, 1.0)
        undo, held = rival.enable(mini) if rival.enable else ((lambda: None), (lambda: 0))
        peak, walking = 0, 0.0

        def after(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal peak, walking
            began = time.process_time()
            peak = max(peak, held())
            walking += time.process_time() - began
            return {}

        self.meter.rows = {"blocks": 0, "attention": 0}
        inputs = minis.inputs(mini.kind, self.labels(seed))
        generator = torch.Generator().manual_seed(seed)
        try:
            with peers.quiet():
                began = time.process_time()
                latents = mini.pipe(
                    **inputs, num_inference_steps=rival.steps, generator=generator, output_type="latent", return_dict=False,
                    callback_on_step_end=after,
                )[0]  # fmt: skip
                seconds = time.process_time() - began - walking
        finally:
            undo()
        if not self.whole:
            if rival.enable is not None:
                raise ValueError("run the exact sampler first: it is the unit of calls")
            self.whole = {what: rows / rival.steps for what, rows in self.meter.rows.items()}
        calls, attention = (self.meter.rows[what] / self.whole[what] for what in ("blocks", "attention"))
        return Result(latents.float(), calls, attention, seconds, peak)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.mini.pixels(latents)


def ours(kind: str) -> list[Rival]:
    """The presets, and the tolerances between and beyond them."""
    import tqai_core

    def on(config: Any) -> Enable:
        def enable(mini: Mini) -> tuple[Callable[[], None], Callable[[], int]]:
            handle = tqai_core.apply(mini.pipe, config)
            return handle.remove, lambda: handle.nbytes

        return enable

    balanced = preset("balanced", names.family(kind))
    at = lambda tau: on(replace(balanced, monitor=f"lyapunov:tau={tau}"))  # noqa: E731
    rivals = [Rival("tqai", name, on(preset(name, names.family(kind))), zero=at(0)) for name in PRESETS]
    rivals += [Rival("tqai", f"tau={tau:g}", at(tau), zero=at(0)) for tau in TAUS]
    bare = [(name, replace(preset(name, names.family(kind)), codec="exact")) for name in PRESETS]
    return rivals + [Rival("tqai", f"{name}, uncoded", on(config), zero=at(0)) for name, config in bare]


def _rows(name: str, function: Callable[..., Any], *settings: tuple[str, dict[str, Any]], helped: str = "") -> list[Rival]:
    """A peer at its settings; ``function(pipe, **options)`` switches it on and returns what switches it off."""
    from . import dit_caches as peers

    def on(options: dict[str, Any]) -> Enable:
        def enable(mini: Mini) -> tuple[Callable[[], None], Callable[[], int]]:
            pipe = mini.pipe
            clear = peers.context(pipe) if "context" in helped else lambda: None
            try:
                undo = function(pipe, **options)
            except BaseException:
                clear()
                raise
            return (lambda: (undo(), clear())[1]), (lambda: peers.held(pipe))

        return enable

    zero = lambda options: on(options | {"threshold": 0.0}) if "threshold" in options else None  # noqa: E731
    return [Rival(name, setting, on(options), helped, zero=zero(options)) for setting, options in settings]


def rivals(kind: str, ratios: list[float], steps: int = STEPS) -> list[Rival]:
    """Every peer at its settings. ``ratios`` are MagCache's, calibrated on other seeds."""
    solvers = [("Euler", "euler", (16, 12, 10)), ("UniPC", "unipc", (12, 10)), ("DPM++", "dpm++", (12, 10))]
    plain = [Rival(name, f"{n} steps", steps=n, solver=solver) for name, solver, counts in solvers for n in counts]
    return [*_of_diffusers(kind, ratios, steps), *_of_cache_dit(kind, steps), *_spectrum(), *plain]


def _spectrum() -> list[Rival]:
    """Our form of Spectrum: its fit alone, blended with a line, with gaps that grow less, and at the defaults of a port that is used."""
    from . import dit_caches as peers
    from .spectrum import Schedule

    return _rows(
        "Spectrum", peers.spectrum,
        ("order 3, ridge .1", dict(order=3, ridge=0.1)),
        ("order 3, ridge .1, blend .5", dict(order=3, ridge=0.1, blend=0.5)),
        ("order 3, ridge .1, blend .5, flex .25", dict(order=3, ridge=0.1, blend=0.5, schedule=Schedule(flex=0.25))),
        ("as stable-diffusion.cpp", dict(order=3, ridge=1.0, blend=0.4, schedule=Schedule(warmup=4, window=2, flex=0.5, stop=0.9))),
        helped="our form of it",
    )  # fmt: skip


def _of_diffusers(kind: str, ratios: list[float], steps: int) -> list[Rival]:
    from tqai_core.hosts.diffusers import minis

    from . import dit_caches as peers

    two_calls = kind != "sd3"
    out: list[Rival] = []
    timestep = "" if two_calls else "its timestep read from the scheduler"
    out += _rows(
        "PAB", peers.pab,
        ("skip 2, t 100-800 (default)", dict()),
        ("skip 2, all t", dict(low=-1, high=1001)),
        ("skip 2, cross 4" if kind == "wan" else "skip 4, t 100-800", dict(cross=4) if kind == "wan" else dict(skip=4)),
        helped=timestep,
    )  # fmt: skip
    # where guidance is two calls it takes half of the samples of each for the unconditional branch, or fails
    out += _rows("FasterCache", peers.faster_cache, ("guidance mode (default)", dict()), helped=timestep)
    out += _rows(
        "FasterCache", peers.faster_cache,
        ("distilled, t < 681", dict(distilled=True)),
        ("distilled, skip 3, t < 950", dict(skip=3, high=950, distilled=True)),
        helped=timestep,
    )  # fmt: skip
    context = "" if two_calls else "cache context"
    first = [(f"{t:g}" + (" (default)" if t == 0.05 else ""), dict(threshold=t)) for t in (0.05, 0.1, 0.2)]
    dtype = torch.float32
    taylor: list[tuple[str, dict[str, Any]]] = [
        ("default: every 5, bf16", dict()),
        *((f"attention, every {n}, fp32", dict(interval=n, own_names=True, dtype=dtype)) for n in (2, 3)),
        *((f"lite, every {n}, fp32", dict(interval=n, lite=True, dtype=dtype)) for n in (2, 3)),
    ]
    shapes = lambda x: minis.pixels(kind, x).unsqueeze(2)  # noqa: E731
    sea = [(f"{t:g}" + (" (default)" if t == 0.25 else ""), dict(threshold=t)) for t in (0.1, 0.25, 0.5)]
    if context:  # as documented it finds no context; helped, it may run
        out += _rows("FirstBlockCache", peers.first_block, first[0])
        out += _rows("TaylorSeer", peers.taylor_seer, taylor[0])
    out += _rows("FirstBlockCache", peers.first_block, *first, helped=context)
    out += _rows("MagCache", peers.mag_cache, *(
        (f"{t:g}, {k} skips, keep {r:g}" + (" (default)" if t == 0.06 else ""),
         dict(threshold=t, skips=k, retention=r, ratios=ratios, steps=steps))
        for t, k, r in ((0.03, 3, 0.1), (0.06, 3, 0.2), (0.12, 3, 0.2))
    ))  # fmt: skip
    out += _rows("TaylorSeer", peers.taylor_seer, *taylor, helped=context)
    if kind == "wan":
        out += _rows("SeaCache", peers.sea_cache, *sea)
    else:
        out += _rows("SeaCache", peers.sea_cache, sea[1])
        helped = "cache context, shape of the latents"
        out += _rows("SeaCache", peers.sea_cache, *((s, o | {"latents": shapes}) for s, o in sea), helped=helped)
    return out


def _of_cache_dit(kind: str, steps: int) -> list[Rival]:
    from . import dit_caches as peers

    out: list[Rival] = []
    db = lambda **options: dict(options, separate=kind != "sd3", steps=steps)  # noqa: E731
    if names.family(kind) == "flux":
        out += _rows("DBCache", peers.db_cache, ("F1B0, .3, its guidance default", dict(threshold=0.3, steps=steps)))
    out += _rows("DBCache", peers.db_cache, *((f"F1B0, {t:g}", db(threshold=t)) for t in (0.08, 0.15, 0.3)))
    out += _rows(
        "DBCache + TaylorSeer", peers.db_cache, *((f"F1B0, {t:g}, order 1", db(threshold=t, taylor=True)) for t in (0.08, 0.15, 0.3))
    )
    return out


def absent() -> dict[str, str]:
    """Peers that cannot run here, and the cure."""
    import importlib.util

    from . import dit_caches as peers

    missing = {} if importlib.util.find_spec("cache_dit") else {"cache-dit": CACHE_DIT}
    return missing | peers.absent()


def measure(
    track: Track, rivals: Sequence[Rival], seeds: Sequence[int], truth: dict[int, Tensor] | None = None, tell: Any = None
) -> list[Row]:
    """One row a rival: medians over ``seeds``, CPU time as a ratio to the exact runs just before and after."""
    values: list[list[Row]] = [[] for _ in rivals]
    failed: dict[int, str] = {}
    exact_rows: list[Row] = []
    for seed in seeds:
        exact = track.exact(seed)
        exact_rows.append(_figures(track, exact, exact, truth, seed))
        before, waiting = exact.seconds, []
        for i, rival in enumerate(rivals):
            if i in failed:
                continue
            if tell:
                tell(f"{track.mini.kind}, seed {seed}: {rival.peer}, {rival.setting}")
            try:
                result = track.run(rival, seed)
                values[i].append(_figures(track, result, exact, truth, seed))
                waiting.append((values[i][-1], result.seconds))
            except Exception as error:
                failed[i] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            if len(waiting) == ANCHOR or i == len(rivals) - 1:
                now = track.exact(seed).seconds
                for figures, seconds in waiting:
                    figures["cpu"] = (before + now) / 2 / seconds
                before, waiting = now, []
        for figures, seconds in waiting:  # the last rival failed, so no exact run came after
            figures["cpu"] = before / seconds
    zero = at_zero(track, rivals, seeds[0])
    out: list[Row] = [
        {
            "peer": "exact",
            "setting": "24 Euler steps",
            "helped": "",
            "note": "",
            "failed": None,
            **_over(exact_rows),
            "cpu": 1.0,
            "zero": "",
        }
    ]
    for i, rival in enumerate(rivals):
        row: Row = {"peer": rival.peer, "setting": rival.setting, "helped": rival.helped, "note": "", "failed": failed.get(i)}
        row["zero"] = zero.get((rival.peer, rival.helped), "") if rival.zero else ""
        if i not in failed:
            row |= _over(values[i])
            if min(row["calls"], row["attention"]) > track.steps - 1e-6:
                row["note"] = "saved nothing: 0 calls"
        out.append(row)
    return out


def at_zero(track: Track, rivals: Sequence[Rival], seed: int) -> dict[tuple[str, str], str]:
    """Of each method with a threshold, helped or not: is threshold 0 the exact run bit for bit? "yes", "NO", or what it raises."""
    exact, out = track.exact(seed).latents, dict[tuple[str, str], str]()
    for rival in rivals:
        key = rival.peer, rival.helped
        if rival.zero is None or key in out:
            continue
        try:
            out[key] = "yes" if torch.equal(track.run(replace(rival, enable=rival.zero), seed).latents, exact) else "NO"
        except Exception as error:
            out[key] = f"fails: {type(error).__name__}"
    return out


def _over(rows: Sequence[Row]) -> Row:
    """Medians over seeds, and mean and sd of PSNR over the pictures of all seeds; where some are exact the mean is infinite."""
    pictures = [value for row in rows for value in row["psnr_each"]]
    spread = pstdev(pictures) if all(map(math.isfinite, pictures)) else None
    return {**medians(rows), "psnr_mean": fmean(pictures), "psnr_sd": spread}


def _figures(track: Track, result: Result, exact: Result, truth: dict[int, Tensor] | None, seed: int) -> Row:
    a, b = track.pixels(result.latents), track.pixels(exact.latents)
    labels = (track.mini.labels(result.latents) == track.mini.labels(exact.latents)).float().mean()
    return {
        "calls": result.calls, "share": result.calls / track.steps, "attention": result.attention,
        "psnr": psnr(result.latents, exact.latents), "ssim": ssim(a, b),
        "psnr_each": each(psnr, result.latents, exact.latents),
        "nmse": nmse(result.latents, exact.latents), "ode": nmse(result.latents, truth[seed]) if truth else None,
        "agreement": float(labels), "held": result.held,
    }  # fmt: skip


def mixing(track: Track, seeds: Sequence[int]) -> Row:
    """What PAB's one state for both guidance branches costs where they are two calls: the same hook with a state a branch
    computes as many attentions."""
    from . import dit_caches as peers

    model, kind = track.mini.pipe.transformer, track.mini.kind
    first = next(m for name, m in model.named_modules() if name.endswith(".to_q"))
    at = {"call": -1, 0: 0, 1: 0}
    hooks = [
        model.register_forward_pre_hook(lambda *_: at.__setitem__("call", at["call"] + 1)),
        first.register_forward_pre_hook(lambda *_: at.__setitem__(at["call"] % 2, at[at["call"] % 2] + 1)),
    ]
    rows = []
    try:
        for seed in seeds:
            exact = track.exact(seed)
            row: Row = {}
            for name, per_branch in (("shared", False), ("per_branch", True)):

                def on(mini: Mini, per_branch: bool = per_branch) -> Any:
                    return peers.pab(mini.pipe, 2, -1, 1001, per_branch=per_branch), lambda: peers.held(mini.pipe)

                at.update({"call": -1, 0: 0, 1: 0})
                run = track.run(Rival("PAB", "skip 2, all t", on, steps=track.steps), seed)
                row |= {f"{name}_nmse": nmse(run.latents, exact.latents), f"{name}_attention": run.attention}
                row |= {f"{name}_cond": at[0], f"{name}_uncond": at[1], f"{name}_held": run.held}
            rows.append(row | {"ratio": row["shared_nmse"] / row["per_branch_nmse"]})
    finally:
        for hook in hooks:
            hook.remove()
    return {"mini": kind, "steps": track.steps, **medians(rows)}


def bench(kinds: Sequence[str], seeds: Sequence[int], tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data."""
    from . import dit_caches as peers

    one_thread()
    began = time.process_time()
    tables: dict[str, list[Row]] = {}
    mixed: list[Row] = []
    ratios: dict[str, list[float]] = {}
    for kind in kinds:
        track = Track(kind)
        tell(f"{kind}: true ODE, {dit.TRUTH} calls a seed")
        truth = {seed: dit.true_ode(track.mini, seed, track.samples).latents for seed in seeds}
        track.mini.schedule("euler", 1.0)
        track.exact(CALIBRATION[0])  # sets the unit of calls; warm caches are part of no figure
        tell(f"{kind}: MagCache's ratios on seeds {CALIBRATION}")
        lists = [peers.calibrated_ratios(track.mini.pipe, lambda s=s, t=track: t.exact(s), STEPS) for s in CALIBRATION]
        ratios[kind] = [sum(column) / len(lists) for column in zip(*lists, strict=True)]
        tables[kind] = measure(track, ours(kind) + rivals(kind, ratios[kind]), seeds, truth, tell)
        if kind != "sd3":  # one call for both branches: nothing to mix
            tell(f"{kind}: PAB with guidance in two calls")
            mixed.append(mixing(track, seeds))
    result = {
        "bench": "dit peers", "machine": machine(), "seeds": list(seeds), "steps": STEPS, "guidance": 2.0,
        "samples": {k: SAMPLES[k] for k in kinds}, "missing": absent(), "mag_ratios": ratios, "tables": tables, "pab_guidance": mixed,
        "cpu_minutes": (time.process_time() - began) / 60,
    }  # fmt: skip
    result["duels"] = lost_first(duel for kind in kinds for duel in duels(kind, tables[kind]))
    result["verdicts"] = verdicts(result)
    return result


def duels(kind: str, rows: Sequence[Row]) -> list[Row]:
    """Each peer setting against the tqai row of least NMSE among those that take no more CPU time (the exact run for a peer
    that takes as long as that), and against the default preset. Rows that failed or saved nothing are no rivals."""
    mine = [r for r in rows if r["peer"] == "exact" or (r["peer"] == "tqai" and not r["note"])]
    default = next(r for r in rows if (r["peer"], r["setting"]) == ("tqai", "balanced"))
    out = []
    for r in rows:
        if r["peer"] in ("tqai", "exact") or r["failed"] or r["note"]:
            continue
        able = [t for t in mine if t["cpu"] >= r["cpu"]]
        best = min(able, key=lambda t: t["nmse"], default=None)
        ode = min((t["ode"] for t in able if t["ode"] is not None), default=None)
        faster, closer = default["cpu"] >= r["cpu"], default["nmse"] < r["nmse"]
        out.append({
            "mini": kind, "peer": r["peer"], "setting": r["setting"], "cpu": r["cpu"], "nmse": r["nmse"],
            "default": ("better" if closer else "faster, less close") if faster else "closer, slower" if closer else "WORSE",
            "tqai": best and (best["setting"] if best["peer"] == "tqai" else "exact run"), "tqai_cpu": best and best["cpu"],
            "tqai_nmse": best and best["nmse"],
            "ok": bool(best and best["nmse"] < r["nmse"]), "ode_ok": None if ode is None or r["ode"] is None else ode < r["ode"],
        })  # fmt: skip
    return out


def lost_first(found: Iterable[Row]) -> list[Row]:
    """Settings of others that beat ``balanced`` in time and error at once, then those that beat every tqai row, then the rest."""
    return sorted(found, key=lambda duel: (duel["default"] != "WORSE", duel["ok"]))


def verdicts(result: dict[str, Any]) -> list[Row]:
    """What the project promises, recomputed from the rows."""
    out: list[Row] = []
    for kind, rows in result["tables"].items():
        need, fights = promises(out, kind), duels(kind, rows)
        need("settings of others at least as fast as balanced, and of no more error", sum(d["default"] == "WORSE" for d in fights), most=0)
        won = sum(d["ok"] for d in fights)
        need("settings of others that have more error than a tqai setting at least as fast", won, least=len(fights))
    return out


def summary_lines(result: dict[str, Any]) -> list[str]:
    """One line a model, the lost duels by name."""
    lines = []
    for kind, rows in result["tables"].items():
        fights = duels(kind, rows)
        slower = [d for d in fights if d["default"] in ("better", "faster, less close")]
        worse = [f"{d['peer']} {d['setting']}" for d in fights if d["default"] == "WORSE"]
        lost = [f"{d['peer']} {d['setting']} ({d['nmse'] * 1e4:.2f}e-4 at {d['cpu']:.2f}x)" for d in fights if not d["ok"]]
        idle = sum(bool(r["failed"] or (r["note"] and r["peer"] != "tqai")) for r in rows)
        away = [d for d in fights if d["ode_ok"] is not None]
        lines.append(
            f"{kind}: balanced is beaten in time and NMSE at once by {'; '.join(worse) or 'no peer setting'}. It takes no more CPU time "
            f"than {len(slower)} of {len(fights)} peer settings and has lower NMSE than {sum(d['default'] == 'better' for d in slower)} of "
            f"these. Some tqai setting of no more CPU time has lower NMSE than {sum(d['ok'] for d in fights)} of {len(fights)}, and is "
            f"nearer to the true ODE than {sum(d['ode_ok'] for d in away)} of {len(away)}."
            + (f" Lost on NMSE: {'; '.join(lost)}." if lost else "")
            + (f" Rows that failed or saved nothing, no rivals: {idle}." if idle else "")
        )
    return lines


def tables_of(result: Row) -> Iterable[Table]:
    """The duels stand first, lost ones on top."""
    yield _duels_table(result)
    for kind, rows in result["tables"].items():
        yield _rows_table(result, kind, rows)
    if result["pab_guidance"]:
        yield (
            "PAB with guidance in two calls: one state for both branches, and the same hook with a state a branch",
            ["mini", "state", "cond computed", "uncond computed", "attn", "NMSE e-4", "shared / per branch", "held B"],
            [
                [m["mini"], name.replace("_", " "), f"{m[f'{name}_cond']:g}", f"{m[f'{name}_uncond']:g}", f"{m[f'{name}_attention']:.1f}",
                 f"{m[f'{name}_nmse'] * 1e4:.2f}", f"{m['ratio']:.0f}" if name == "shared" else "1", f"{m[f'{name}_held']:,.0f}"]
                for m in result["pab_guidance"] for name in ("shared", "per_branch")
            ],
        )  # fmt: skip
    yield "verdicts", ["a line a model"], [[line] for line in summary_lines(result)]
    yield from closing(result)


def _rows_table(result: Row, kind: str, rows: Sequence[Row]) -> Table:
    scores = ["PSNR", "mean", "sd", "5 %", "least"]
    errors = ["SSIM", "NMSE e-4", "ODE e-4", "labels", "held B"]
    head = ["method", "setting", "calls", "computed", "attn", "CPU x", *scores, *errors, "at 0", "note"]
    cell = lambda v, f: "" if v is None else format(v, f)  # noqa: E731
    body = []
    for r in rows:
        name = [r["peer"] + (" +" if r["helped"] else ""), r["setting"]]
        if r["failed"]:
            body.append([*name, *[""] * (len(head) - 4), r["zero"], f"failed: {r['failed']}"])
            continue
        figures = [f"{r['calls']:.1f}", f"{r['share']:.0%}", f"{r['attention']:.1f}", f"{r['cpu']:.2f}"]
        figures += [cell(r[key], ".1f") for key in ("psnr", "psnr_mean", "psnr_sd", "psnr_tail", "psnr_worst")]
        figures += [cell(r["ssim"], ".4f"), f"{r['nmse'] * 1e4:.2f}", "" if r["ode"] is None else f"{r['ode'] * 1e4:.2f}"]
        body.append([*name, *figures, f"{r['agreement']:.3f}", f"{r['held']:,.0f}", r["zero"], r["note"]])
    title = (
        f"{kind}: {result['steps']} Euler steps, shift 1, guidance 2, batches of {result['samples'][kind]}, seeds "
        f"{', '.join(map(str, result['seeds']))}: medians; mean, sd, 5 % and least: PSNR of single pictures; calls and attention that "
        "ran, in steps; at 0: threshold 0 is the exact run, bit for bit; +: helped by this bench"
    )
    return title, head, body


def _duels_table(result: Row) -> Table:
    cell = lambda v, f: "" if v is None else format(v, f)  # noqa: E731
    return (
        "duels: each peer setting against the tqai setting of least NMSE that takes no more CPU time; lost ones first",
        ["mini", "peer", "setting", "CPU x", "NMSE e-4", "balanced", "tqai", "CPU x", "NMSE e-4", "lower"],
        [
            [d["mini"], d["peer"], d["setting"], f"{d['cpu']:.2f}", f"{d['nmse'] * 1e4:.2f}",
             d["default"], d["tqai"] or "none so fast",
             cell(d["tqai_cpu"], ".2f"), "" if d["tqai_nmse"] is None else f"{d['tqai_nmse'] * 1e4:.2f}", "yes" if d["ok"] else "NO"]
            for d in lost_first(result["duels"])
        ],
    )  # fmt: skip
