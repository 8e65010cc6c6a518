"""``tqai bench few``: what helps a sampler of eight steps and fewer, at equal time, judged as a user would.

The few-step students of the photo mini and of the WAN mini with 4, 6 and 8 steps, and their teachers with 8. Every method draws the same
32 seeds. Each row says what it takes (CPU time beside the exact run's), how near it is to its own exact result (PSNR and SSIM of every
picture: median, 5 % quantile, minimum), and what a user sees: the Fréchet distance to real pictures and the share read as asked.
"Fewer steps" is the same sampler with fewer steps; between two of these a straight line over time says what it has at equal time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tqai_core import TqaiError
from tqai_core.config import Config, preset
from tqai_core.metrics import psnr, ssim
from tqai_core.minis import names

from .harness import Mini, Row, Table, closing, each, machine, one_thread, promises, tails
from .judges import Clips, Eye, Photographs

FINE = 24  # steps of the teacher that students are compared with
TRACKS = {"photo_8": (8, 6), "photo_4": (4,), "wan_4": (4,), "photo": (FINE,), "wan": (8,), names.SIZES: (8,)}  # steps of each mini
KINDS = tuple(TRACKS)
SEEDS = 32
FEWER_SEEDS = {"photo": 16, "wan": 16, names.SIZES: 16}  # where a seed takes long
SAMPLES = {"photo": 4, "wan": 1, names.SIZES: 1}  # pictures or clips a seed, by the teacher
EXACT, FEWER, COARSE = "exact", "fewer steps", "coarse to fine"
LESS = {24: (12, 9), 8: (6, 5, 4, 3), 6: (5, 4, 3, 2), 4: (3, 2, 1)}  # "fewer steps" of so many
CLOSE = 1.05  # a Fréchet distance that much larger is still as good
FASTER = {24: 2.6, 8: 1.5, 4: 1.25}  # what a part must give to be offered
WORSE = {"photo_8": 1.15, "photo_4": 1.40}  # a student's Fréchet distance beside its teacher's, at most


@dataclass(frozen=True)
class Method:
    group: str
    name: str
    config: Config | None = None
    steps: int = 0  # 0: as many as the track has


def methods(kind: str, steps: int) -> list[Method]:
    """Everything that is tried at so many steps."""
    out = [Method(FEWER, f"{n} steps", steps=n) for n in LESS[steps]]
    if steps == FINE:
        return out + many(names.family(kind))
    longest, ends = skips(steps)[-1], [at_level("model", what, steps, to_the_end(steps)) for what in ORDERS]
    if kind not in names.STUDENTS:  # students have the other rows: here guidance counts
        sized = coarse(steps)[: None if kind in (names.PHOTO, names.SIZES) else 1]  # the WAN mini knows one size: one row says so
        return [*out, *(at_level("model", what, steps, longest) for what in ORDERS), *ends, *guidance(steps), *sized]
    levels = [("model", what, skipped) for what in ORDERS for skipped in dict.fromkeys([skips(steps)[0], longest])]
    levels += [("block", what, longest) for what in ORDERS] + [("attention", "order 1", longest)]
    out += [at_level(level, what, steps, skipped) for level, what, skipped in levels] + ends
    out.append(Method("block level", "order 1, the first block exact", at("block", "delta2", steps, longest, skip_layers=(0,))))
    sparse = Config(level="attention", scorer="bsa", strategy="window:density=0.5", monitor=schedule(steps, range(2, steps - 1)))
    out.append(Method("sparse attention", "half of the blocks, from the third step on", sparse))
    return out + coarse(steps)[: None if names.STUDENTS[kind] == names.PHOTO else 1]  # WAN's mini knows one size: one row says so


def many(family: str) -> list[Method]:
    """With as many steps as teachers take: the default preset, and with the first steps at half the size."""
    balanced = preset("balanced", family)
    mixed = [Method("combination", f"balanced; {COARSE}, {share:.0%}", replace(balanced, half_size=share)) for share in (0.1, 0.2, 0.3)]
    return [Method("preset", "balanced", balanced), *mixed]


PLAIN = Config(strategy=None, monitor=None, codec="exact")
ORDERS = {"reuse": "delta", "order 1": "delta2"}


def at_level(level: str, what: str, steps: int, skipped: Sequence[int]) -> Method:
    return Method(f"{level} level", f"{what}, without {told(skipped)}", at(level, ORDERS[what], steps, skipped))


def guidance(steps: int) -> list[Method]:
    """The difference of the branches, forecast at every second step; then with whole steps forecast too."""
    every, some = "fixed:interval=1,min_steps=1", schedule(steps, skips(steps)[0])
    of = lambda strategy, monitor: Config(strategy=f"{strategy}:cfg=difference", monitor=monitor, codec="exact")  # noqa: E731
    return [
        Method("guidance", "difference of the branches, order 1", of("delta2", every)),
        Method("combination", f"difference and steps, order 1, without {told(skips(steps)[0])}", of("delta2", some)),
    ]


def coarse(steps: int) -> list[Method]:
    """The first steps at half the height and width, alone and with forecasts."""
    on = lambda share, skipped=(): replace(at("model", "delta2", steps, skipped) if skipped else PLAIN, half_size=share)  # noqa: E731
    out = [Method(COARSE, f"finer detail up to {share:.0%} signal", on(share)) for share in (0.1, 0.2, 0.3)]
    for share, skipped in dict.fromkeys([(0.2, skips(steps)[0]), (0.2, skips(steps)[-1]), (0.3, skips(steps)[-1])]):
        out.append(Method("combination", f"{COARSE}, {share:.0%}; order 1, without {told(skipped)}", on(share, skipped)))
    return out


def skips(steps: int) -> list[tuple[int, ...]]:
    """Which steps are not computed: the last but one, then every second one before it too; never the first two nor the last."""
    return [tuple(sorted(range(steps - 2, 1, -2)[:count])) for count in range(1, (steps - 2) // 2 + 1)]


def to_the_end(steps: int) -> tuple[int, ...]:
    """Every second step after the first three, be it the last: what preset ``few`` does not compute."""
    return tuple(range(3, steps, 2))


def told(skipped: Sequence[int]) -> str:
    return f"step{'s' if len(skipped) > 1 else ''} {', '.join(str(i + 1) for i in skipped)}"


def schedule(steps: int, skipped: Sequence[int]) -> str:
    final = ",final=false" if steps - 1 in skipped else ""
    return f"schedule:steps={'+'.join(str(i) for i in range(steps) if i not in skipped)},total={steps}{final}"


def at(level: str, strategy: str, steps: int, skipped: Sequence[int], **more: Any) -> Config:
    return Config(level=level, strategy=strategy, monitor=schedule(steps, skipped), codec="exact", **more)


def bench(
    kinds: Sequence[str] = KINDS,
    tell: Callable[[str], None] = lambda text: None,
    count: int = SEEDS,
    only: str = "",
    into: str | None = None,
) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress; ``count`` seeds from 0 on. ``only``: the rows that begin with it, measured
    beside their exact run, and the teachers of ``photo_8 teacher`` and the like; they take the place of those of the file ``into``."""
    one_thread()
    starts = [f"{k} {n} {m.group} {m.name}" for k in kinds for n in TRACKS[k] for m in methods(k, n)] + [
        f"{k} teacher" for k in names.STUDENTS
    ]
    if not any(start.startswith(only) for start in starts):
        raise TqaiError(f"bench few --only: no row begins with {only!r}: give a mini, its steps and a part, as in 'photo_8 8 block level'")
    if only:
        earlier(into)  # before anything is measured
    new: list[list[Row]] = []
    for track in (Track(kind, steps, only) for kind in kinds for steps in TRACKS[kind]):
        if track.asked:
            many = min(count, FEWER_SEEDS.get(track.kind, count))
            tell(f"{track.kind}: {many} seeds of {track.steps} steps, {len(track.asked)} rows")
            new.append(track.measure(many))
    students = [kind for kind in kinds if kind in names.STUDENTS and f"{kind} teacher".startswith(only)]
    fresh = {kind: _teacher(kind, count, tell) for kind in students}
    before = earlier(into) if only else {"rows": [], "teachers": []}  # as it is by now: another piece may have come in
    teachers = {row["mini"]: row for row in before["teachers"]} | fresh
    rows = merged(before["rows"], [row for part in new for row in part])
    return result_of(rows, [teachers[kind] for kind in KINDS if kind in teachers], count)


def earlier(file: str | None) -> dict[str, Any]:
    """The result whose rows are to be replaced."""
    if file in (None, "-") or not Path(file).exists():
        raise TqaiError(f"bench few --only replaces rows of an earlier result, and --json names {file or 'none'}: give --json=FILE of one")
    found = json.loads(Path(file).read_text())
    if found.get("bench") != "few":
        raise TqaiError(f"bench few --only: {file} is no result of bench few: give --json=FILE of one")
    for row in found["rows"]:
        if row.get("psnr", 0) is None:  # JSON has no inf
            row["psnr"] = math.inf
    return found


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``rows`` with ``new`` ones in the place of those of the same name, in the order of the table; rows that the bench has no more are
    dropped."""
    found = {(r["mini"], r["steps"], r["group"], r["method"]): r for r in [*rows, *new]}
    out: list[Row] = []
    for track in (Track(kind, steps) for kind in KINDS for steps in TRACKS[kind]):
        keys = [(track.kind, track.steps, m.group, m.name) for m in track.methods]
        out += against_fewer([found[key] for key in keys if key in found])
    return out


def result_of(rows: list[Row], teachers: list[Row], count: int) -> dict[str, Any]:
    result = {"bench": "few", "machine": machine(), "seeds": list(range(count)), "samples": SAMPLES, "rows": rows, "teachers": teachers}
    missing = {"text keys and values kept": "no level keeps them: text and picture are one attention in Flux, and in WAN they are little"}
    run = {(row["mini"], row["steps"]) for row in rows}
    missing |= {f"{kind}, {n} steps": "not run" for kind, counts in TRACKS.items() for n in counts if (kind, n) not in run}
    return result | {"missing": missing, "verdicts": verdicts(result)}


@dataclass(frozen=True)
class Track:
    """One mini at one number of steps."""

    kind: str
    steps: int
    only: str = ""  # how the rows begin that are measured

    @property
    def teacher(self) -> str:
        return names.STUDENTS.get(self.kind, self.kind)

    @property
    def eye(self) -> Eye:
        return Photographs.load() if self.teacher == names.PHOTO else Clips()

    def labels(self, seed: int) -> list[int]:
        many, prompts = SAMPLES[self.teacher], 20 if self.teacher == names.PHOTO else 10
        return [(many * seed + i) % prompts for i in range(many)]

    def measure(self, count: int) -> list[Row]:
        return self.rows(self.collect(range(count)), count)

    @property
    def asked(self) -> list[Method]:
        every = methods(self.kind, self.steps)
        return [m for m in every if f"{self.kind} {self.steps} {m.group} {m.name}".startswith(self.only)]

    @property
    def methods(self) -> list[Method]:
        return [Method(EXACT, f"{self.steps} steps"), *self.asked]

    def collect(self, seeds: Iterable[int]) -> list[Found]:
        """What every method makes of ``seeds``, in the order of the methods."""
        mini, every = Mini(self.kind), self.methods
        mini.schedule("uniform" if self.kind in names.STUDENTS else "euler", 1.0)
        for config in (None, replace(PLAIN, half_size=0.1)):  # warm caches, and that a model is judged once, are part of no figure
            mini.run(self.labels(0), 0, self.steps, config)
        found = [Found() for _ in every]
        for seed in seeds:
            labels, exact = self.labels(seed), None
            for i, method in enumerate(every):
                if found[i].failed:
                    continue
                try:
                    run = mini.run(labels, seed, method.steps or self.steps, method.config)
                except Exception as error:  # a row that fails stays, with its reason
                    found[i].failed = f"{type(error).__name__}: {error}"[:200]
                    continue
                exact = exact or run
                found[i].add(mini.pixels(run.latents), mini.pixels(exact.latents), exact.seconds / run.seconds, run.calls / exact.calls)
        return found

    def rows(self, found: Sequence[Found], count: int) -> list[Row]:
        prompts = torch.tensor([label for seed in range(count) for label in self.labels(seed)])
        rows = []
        for method, seen in zip(self.methods, found, strict=True):
            about = {
                "mini": self.kind,
                "steps": self.steps,
                "seeds": count,
                "group": method.group,
                "method": method.name,
                "failed": seen.failed,
            }
            rows.append(about if seen.failed else about | seen.row(self.eye, prompts))
        return rows


class Found:
    """What one method made of all seeds."""

    def __init__(self) -> None:
        self.failed = ""  # why it could not run
        self.pixels: list[Tensor] = []
        self.values: dict[str, list[float]] = {"psnr": [], "ssim": [], "cpu": [], "calls": []}

    def add(self, pixels: Tensor, exact: Tensor, cpu: float, calls: float) -> None:
        self.pixels.append(pixels)
        new = {"psnr": each(psnr, pixels, exact), "ssim": each(ssim, pixels, exact), "cpu": [cpu], "calls": [calls]}
        for name, values in new.items():
            self.values[name] += values

    def row(self, eye: Eye, prompts: Tensor) -> Row:
        pixels, v = torch.cat(self.pixels), self.values
        figures: Row = {name: median(values) for name, values in v.items()}
        figures |= tails({"psnr_each": v["psnr"], "ssim_each": v["ssim"]})
        return figures | {"distance": eye.distance(pixels), "read": eye.accuracy(pixels, prompts)}


def _teacher(student: str, count: int, tell: Callable[[str], None]) -> Row:
    """The teacher with many steps and its guidance, on the student's seeds."""
    track = Track(names.STUDENTS[student], FINE)
    tell(f"{track.kind}: {count} seeds of {FINE} steps")
    mini, found = Mini(track.kind), Found()
    mini.schedule("euler", 1.0)
    for seed in range(count):
        pixels = mini.pixels(mini.run(track.labels(seed), seed, FINE).latents)
        found.add(pixels, pixels, 1.0, 1.0)
    prompts = torch.tensor([label for seed in range(count) for label in track.labels(seed)])
    return {"mini": student, "teacher": track.kind, "steps": FINE, **found.row(track.eye, prompts)}


def against_fewer(rows: list[Row]) -> list[Row]:
    """Each row with what fewer steps have at its time, by a straight line between the two neighbours. Beyond the fastest of them with
    what that one has in its longer time: fewer steps still would be no better. None for what takes longer than the exact run."""
    line = sorted(((1 / r["cpu"], r) for r in rows if r["group"] in (EXACT, FEWER) and not r["failed"]), key=lambda pair: pair[0])
    return [r if r["failed"] else r | {f"{key}_fewer": _between(line, 1 / r["cpu"], key) for key in ("distance", "psnr")} for r in rows]


def _between(line: list[tuple[float, Row]], time: float, key: str) -> float | None:
    """``psnr`` by the root of the mean square error, which is 0 in the exact run."""
    value = (lambda r: 10 ** (-r["psnr"] / 20)) if key == "psnr" else lambda r: r[key]
    if line and time < line[0][0]:
        return float(line[0][1][key])
    for (before, fast), (after, slow) in pairwise(line):
        if before <= time <= after:
            found = value(fast) + (value(slow) - value(fast)) * (time - before) / (after - before)
            return found if key != "psnr" else math.inf if found <= 0 else -20 * math.log10(found)
    return None


def better(row: Row) -> str:
    """What a part has better than fewer steps at equal time: "Fréchet" (nearer to real pictures), "PSNR" (nearer to its exact run), "both",
    or "no"; nothing of the exact run and of fewer steps themselves."""
    if row["group"] in (EXACT, FEWER):
        return ""
    if row["failed"] or row["distance_fewer"] is None:
        return "no"
    ours, fewer = (math.inf if row[key] is None else row[key] for key in ("psnr", "psnr_fewer"))  # JSON has no inf
    look, own = row["distance"] <= row["distance_fewer"], ours >= fewer
    return "both" if look and own else "Fréchet" if look else "PSNR" if own else "no"


def close(rows: Sequence[Row], *wanted: str) -> list[Row]:
    """Of one mini and number of steps, the exact run first: what is ``wanted`` better and within 5 % of the exact run's distance."""
    return [r for r in rows if better(r) in wanted and r["distance"] <= CLOSE * rows[0]["distance"]]


def verdicts(result: Row) -> list[Row]:
    out: list[Row] = []
    for teacher in result["teachers"]:
        kind = teacher["mini"]
        own = next(r for r in result["rows"] if r["mini"] == kind and r["group"] == EXACT)
        if kind in WORSE:
            worse = own["distance"] / teacher["distance"]
            promises(out, kind)(f"Fréchet distance beside the teacher's with {teacher['steps']} steps", worse, most=WORSE[kind])
    for kind, steps in dict.fromkeys((r["mini"], r["steps"]) for r in result["rows"]):
        if steps not in FASTER:
            continue
        rows = [r for r in result["rows"] if (r["mini"], r["steps"]) == (kind, steps)]
        readings = (("", ("Fréchet", "both")), (" and to the exact run", ("both",)))
        for than, wanted in readings[:1] if steps == FINE else readings:
            found = max((r["cpu"] for r in close(rows, *wanted)), default=1.0)
            what = f"{steps} steps: CPU-time ratio at a Fréchet distance within 5 %, nearer to real pictures{than} than fewer steps"
            promises(out, kind)(what, found, least=FASTER[steps])
    return out


def lost_first(rows: Iterable[Row]) -> list[Row]:
    """Of each mini and number of steps: failed, then those that fewer steps beat, the worst first."""

    def rank(row: Row) -> tuple[int, float]:
        return ("no", "PSNR", "Fréchet", "both").index(better(row)), -row["distance"] / (row["distance_fewer"] or row["distance"])

    rows = list(rows)
    out: list[Row] = []
    for track in dict.fromkeys((r["mini"], r["steps"]) for r in rows):
        own = [r for r in rows if (r["mini"], r["steps"]) == track]
        whole = [r for r in own if not r["failed"]]
        parts = [r for r in whole if r["group"] not in (EXACT, FEWER)]
        out += [r for r in own if r["failed"]] + sorted(parts, key=rank) + [r for r in whole if r["group"] in (EXACT, FEWER)]
    return out


def _cells(r: Row, most: int) -> list[str]:
    head = [r["mini"] + ("" if r["seeds"] == most else f", {r['seeds']} seeds"), str(r["steps"]), r["group"], r["method"]]
    if r["failed"]:
        return [*head, *[""] * 9, f"failed: {r['failed']}"]
    db = ["exact" if r[key] is None or math.isinf(r[key]) else f"{r[key]:.1f}" for key in ("psnr", "psnr_tail", "psnr_worst")]
    similar = [f"{r[key]:.3f}" for key in ("ssim", "ssim_worst")]
    fewer = ["" if r.get(key) is None or r["group"] in (EXACT, FEWER) else f"{r[key]:.2f}" for key in ("distance_fewer", "psnr_fewer")]
    return [*head, f"{r['cpu']:.2f}", *db, *similar, f"{r['distance']:.3f}", f"{r['read']:.3f}", ", ".join(filter(None, fewer)), better(r)]


def tables_of(result: Row) -> Iterable[Table]:
    """(title, head, rows) for a terminal or Markdown."""
    samples = ", ".join(f"{n} a seed ({kind})" for kind, n in result["samples"].items())
    most = max(r["seeds"] for r in result["rows"])
    yield (
        f"{most} seeds where no other number stands, {samples}: what loses to fewer steps at equal time first",
        ["mini", "steps", "part", "method", "CPU ratio", "PSNR dB", "5 %", "least", "SSIM", "least", "Fréchet", "read as asked",
         "fewer steps: Fréchet, dB", "better at equal time"],
        [_cells(r, most) for r in lost_first(result["rows"])],
    )  # fmt: skip
    yield (
        "students beside their teachers",
        ["student", "teacher", "steps", "Fréchet", "read as asked"],
        [[t["mini"], t["teacher"], str(t["steps"]), f"{t['distance']:.3f}", f"{t['read']:.3f}"] for t in result["teachers"]],
    )
    yield from closing(result)
