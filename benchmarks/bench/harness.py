"""What the benches share beside :mod:`tqai_core.measure`: promises, medians, tables, and work in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minis.judge import Judge
from torch import Tensor

import tqai_core
from tqai_core import measure
from tqai_core.measure import Run, compare, each, machine, one_thread, tails
from tqai_core.minis import names

__all__ = ["Mini", "Row", "Run", "Table", "Verdict", "child", "closing", "compare", "each", "machine", "medians", "one_thread", "promises"]

Row = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows
PATHS = [str(Path(__file__).resolve().parents[1]), str(Path(tqai_core.__file__).resolve().parents[1])]  # of `bench` and `tqai_core`


class Mini(measure.Mini):
    """A mini, whose photographs the laboratory's own judge reads."""

    @property
    def photographs(self) -> bool:
        return names.STUDENTS.get(self.kind, self.kind) == names.PHOTO

    def labels(self, latents: Tensor) -> Tensor:
        return Judge.load().read(self.pixels(latents)) if self.photographs else super().labels(latents)


@dataclass(frozen=True)
class Verdict:
    """A promise beside what was measured; ``measured`` is None where it could not be, and then the promise is not kept."""

    what: str
    measured: float | None
    needed: str
    ok: bool
    mini: str = ""

    @classmethod
    def of(cls, what: str, measured: float | None, least: float | None, most: float | None, mini: str = "") -> Verdict:
        kept = measured is not None and (least is None or measured >= least) and (most is None or measured <= most)
        return cls(what, measured, f">= {least:.4g}" if least is not None else f"<= {most:.4g}", bool(kept), mini)

    def row(self) -> Row:
        """As it stands in the JSON."""
        return {key: value for key, value in asdict(self).items() if key != "mini" or value}

    def cells(self) -> list[str]:
        return [
            self.mini,
            self.what,
            "unknown" if self.measured is None else f"{self.measured:.4g}",
            self.needed,
            "yes" if self.ok else "NO",
        ]


def promises(out: list[Row], mini: str = "") -> Callable[..., None]:
    """``need(what, measured, least=None, most=None)``, which adds the JSON form of a :class:`Verdict` to ``out``."""

    def need(what: str, measured: float | None, least: float | None = None, most: float | None = None) -> None:
        out.append(Verdict.of(what, measured, least, most, mini).row())

    return need


def closing(result: Row) -> Iterator[Table]:
    """The last tables of every bench: what is missing and why, then the promises, those that fail first."""
    if result.get("missing"):
        yield "missing", ["what", "why"], [[name, why] for name, why in result["missing"].items()]
    if found := sorted((Verdict(**row) for row in result["verdicts"]), key=lambda v: v.ok):
        first = 0 if any(v.mini for v in found) else 1
        yield "promises", ["mini", "what", "measured", "needed", "kept"][first:], [v.cells()[first:] for v in found]


def medians(rows: Iterable[Row]) -> Row:
    """Every figure's median over ``rows``; names, and what the first row has not measured, as in the first row. Lists of pictures
    are pooled: their 5 % quantile and the worst."""
    rows = list(rows)

    def over(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [x for r in rows for x in r[key]]
        return value if value is None or isinstance(value, str) else median(r[key] for r in rows)

    return tails({key: over(key, value) for key, value in rows[0].items()})


def child(work: str, *arguments: str) -> Row:
    """Run Python code ``work``, which sets ``found`` to a dict, on one thread in a process of its own: ``found`` and, as
    ``stderr``, what it said. RuntimeError where it fails."""
    code = f"import json, sys\nfrom bench.harness import one_thread\none_thread()\n{work}\nprint('RESULT ' + json.dumps(found))"
    paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=env)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{arguments} failed: {run.stderr[-2000:]}")
    return {**json.loads(lines[-1].removeprefix("RESULT ")), "stderr": run.stderr}
