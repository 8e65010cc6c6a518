"""``tqai report``: one page with SVG pictures for a calibration or a study, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import TqaiError
from ..files import MOST_HEADER, read_json
from ..pages import render, said
from ..plot import BLUE, FAINT, ORANGE, Drawing, Svg
from . import tune
from .file import Calibration


def page(path: Path) -> str:
    """HTML of a file of ``tqai calibrate``, a study of ``tqai tune`` (.db) or its ``--json``. ValueError for anything else."""
    if not path.is_file():
        raise TqaiError(f"{path} is not there: give a file of tqai calibrate or tqai tune")
    with path.open("rb") as file:
        head = file.read(16).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"SQLite format"):
        return _study(path.name, tune.load_study(path))
    if head.lstrip().startswith(b"{"):
        found = read_json(path, what="study", again="give what tqai tune --json wrote", most=MOST_HEADER)
        if not isinstance(found, dict) or found.get("what") != "study":
            raise TqaiError(f"{path} is JSON, but no study: give what tqai tune --json wrote")
        return _study(path.name, tune.check_study(found, str(path)))
    return _calibration(path.name, Calibration.load(path))


def _calibration(name: str, made: Calibration) -> str:
    h, t = made.header, made.tensors
    verdict = h["verdicts"]["bits"]
    ours, plain, won = verdict["fisher"], verdict["uniform"], verdict["kept"] == "fisher"
    heads = [
        [stream, str(i), f"{v['klt']:.2e}", f"{v['hadamard']:.2e}", (v["kept"], "won" if v["kept"] == "klt" else "lost")]
        for stream, found in h["verdicts"]["bases"].items()
        for i, v in enumerate(found)
    ]
    kept = sum(row[4][1] == "won" for row in heads)
    sigmas = t["sigmas"].tolist()
    return render(
        "calibration", title=f"tqai calibrate: {name}",
        verdict=f"On seeds that nothing was fitted on, fitted bases are better in {kept} of {len(heads)} heads, and bits by sensitivity "
        f"{'are better than' if won else 'are no better than'} the same bits everywhere. What is no better is not kept.",
        about=[[key, said(h.get(key))] for key in ("class", "model", "seeds", "held_out", "steps", "samples", "codec", "versions")],
        sensitivity=[_maps(t["fisher"][..., band], f"{{}}, sigma {sigma:.2f}") for band, sigma in enumerate(sigmas)],
        bits=(
            f"{verdict['average']:g} on average, {verdict['how']}. Loss on seeds {said(verdict['seeds'])}: {ours['loss']:.3g} "
            f"({ours['bytes']:,} bytes), uniform {plain['loss']:.3g} ({plain['bytes']:,} bytes):",
            (verdict["kept"], "won" if won else "lost"), "kept." if won else "kept, so that the file has uniform bits.",
        ),
        widths=[_maps(t["bits"][..., band].float(), f"bits of {{}}, sigma {sigma:.2f}", log=False) for band, sigma in enumerate(sigmas)],
        bases=f"NMSE at {h['basis_bits']:d} bits on seed {h['held_out']:d}, which nothing was fitted on.", heads=heads,
    )  # fmt: skip


def _maps(table: Tensor, title: str, log: bool = True) -> list[Drawing]:
    """Keys and values side by side; ``table [layers, heads, 2]``."""
    return [heat_map(table[..., i].tolist(), title.format(kind), log) for i, kind in enumerate(("keys", "values"))]


def _study(name: str, found: dict[str, Any]) -> str:
    budget, proof = found["budget"], found.get("proof", {})
    verdict = f"{len(found['trials'])} pipelines were tried."
    if (kept := found.get("kept")) in proof:
        row, others = proof[kept], [f"{other} {row['error']:.2e}" for other, row in proof.items() if other != kept]
        verdict += f" {kept} is kept: on unseen seeds its error is {row['error']:.2e}"
        verdict += f", that of the others {', '.join(others)}." if others else "."
    return render(
        "study", title=f"tqai tune: {name}", verdict=verdict, what=budget["what"],
        about=[[key, said(value)] for key, value in found["settings"].items()],
        charts=[pareto(found), pareto(found, 350)] if found["trials"] else [], tables=tune.tables_of(found),
        config=json.dumps(found["config"], indent=1) if "config" in found else "",
    )  # fmt: skip


def pareto(found: Mapping[str, Any], width: int = 640, height: int = 300) -> Drawing:
    """Error (log) against what the budget limits: all trials, the front, the limit, and the proof where there is one."""
    what, limit = found["budget"]["what"], found["budget"]["limit"]
    rows = [r for r in found["trials"] if r["error"] > 0]
    left, top, right, floor = 52, 26, width - 24, height - 40
    most = max([r[what] for r in rows] + [limit]) * 1.05
    low = math.floor(min([math.log10(r["error"]) for r in rows], default=-4))
    high = math.ceil(max([math.log10(r["error"]) for r in rows], default=0))
    x = lambda v: left + v / most * (right - left)  # noqa: E731
    y = lambda e: floor - (math.log10(e) - low) / max(high - low, 1) * (floor - top)  # noqa: E731
    svg = Svg(width, height)
    for decade in range(low, high + 1):
        svg.level(y(10.0**decade), left, right, f"1e{decade}")
    count = width // 110
    for value in (most * i / count for i in range(count + 1)):
        svg.text(x(value), floor + 16, f"{value:,.0f}" if what == "bytes" else f"{value:.2f}", text_anchor="middle")
    svg.line([(x(limit), top), (x(limit), floor)], ORANGE, stroke_dasharray="4 3")
    for r in rows:
        svg.dot(x(r[what]), y(r["error"]), FAINT, title=f"trial {r['trial']}: {r['config']['strategy']} {r['config']['monitor']}")
    by_trial = {r["trial"]: r for r in rows}
    svg.line([(x(by_trial[n][what]), y(by_trial[n]["error"])) for n in found["front"] if n in by_trial], BLUE)
    shown = [("dot", FAINT, "a trial"), ("line", BLUE, "the best ones"), ("dashes", ORANGE, "the budget")]
    for nth, (name, row) in enumerate((name, row) for name, row in found.get("proof", {}).items() if row["error"] > 0):
        svg.mark(x(row[what]), min(max(y(row["error"]), top), floor), ORANGE, nth)
        shown.append((str(nth), ORANGE, f"{name[:30]}, unseen seeds"))
    svg.text((left + right) / 2, height - 8, what, text_anchor="middle")
    svg.text(left, 14, "error to the exact run (NMSE)")
    svg.legend(shown, 8)
    return svg.drawing()


def heat_map(table: Sequence[Sequence[float]], title: str, log: bool = True, cell: int = 30) -> Drawing:
    """A map of ``table[layer][head]``, dark where a number is large; each cell shows its number under the pointer."""
    flat = [math.log10(max(v, 1e-30)) if log else v for row in table for v in row]
    low, high = min(flat), max(flat)
    heads = max(len(row) for row in table)
    left, top = 62, 38
    svg = Svg(max(left + heads * cell + 10, 240), top + len(table) * cell + 8)
    svg.text(6, 14, title)
    svg.text(left, top - 8, "heads, from the first")
    for layer, row in enumerate(table):
        baseline = top + (layer + 0.65) * cell
        svg.text(left - 6, baseline, f"layer {layer}", text_anchor="end")
        for head, value in enumerate(row):
            part = (flat[layer * heads + head] - low) / (high - low) if high > low else 0.5
            place = {"x": left + head * cell, "y": top + layer * cell, "width": cell - 1, "height": cell - 1}
            svg.add("rect", f"layer {layer}, head {head}: {value:.3g}", **place, fill=_shade(part))
            if not log:
                ink = "#ffffff" if part > 0.5 else "#111"  # on its own cell, in a dark page too
                svg.text(left + (head + 0.5) * cell, baseline, f"{value:.3g}", text_anchor="middle", fill=ink)
    _scale(svg, [10**low, 10**high] if log else [low, high])
    return svg.drawing()


def _shade(part: float) -> str:
    return f"rgb({round(245 - 214 * part)},{round(245 - 150 * part)},{round(245 - 77 * part)})"


def _scale(svg: Svg, ends: Sequence[float]) -> None:
    """The legend of a heat map: its shades from the least number to the largest."""
    y, left, parts = svg.height + 4, 62, 12
    for i in range(parts):
        svg.add("rect", x=left + 6 * i, y=y, width=6, height=12, fill=_shade(i / (parts - 1)))
    svg.text(left - 6, y + 10, f"{ends[0]:.2g}", text_anchor="end")
    svg.text(left + 6 * parts + 6, y + 10, f"{ends[1]:.2g}")
    svg.height = y + 20
