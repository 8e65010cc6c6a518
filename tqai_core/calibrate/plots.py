"""Pictures of calibrations and studies, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..plot import BLUE, INK, ORANGE, Svg


def pareto(found: Mapping[str, Any], width: int = 640, height: int = 320) -> str:
    """Error (log) against what the budget limits: all trials, the front, the limit, and the proof where there is one."""
    what, limit = found["budget"]["what"], found["budget"]["limit"]
    rows = [r for r in found["trials"] if r["error"] > 0]
    left, top, right, floor = 70, 20, width - 14, height - 44
    most = max([r[what] for r in rows] + [limit]) * 1.05
    low = math.floor(min([math.log10(r["error"]) for r in rows], default=-4))
    high = math.ceil(max([math.log10(r["error"]) for r in rows], default=0))
    x = lambda v: left + v / most * (right - left)  # noqa: E731
    y = lambda e: floor - (math.log10(e) - low) / max(high - low, 1) * (floor - top)  # noqa: E731
    svg = Svg(width, height)
    for decade in range(low, high + 1):
        svg.level(y(10.0**decade), left, right, f"1e{decade}")
    for value in (most * i / 5 for i in range(6)):
        svg.text(x(value), floor + 16, f"{value:,.0f}" if what == "bytes" else f"{value:.2f}", text_anchor="middle")
    svg.line([(x(limit), top), (x(limit), floor)], ORANGE, stroke_dasharray="5 3")
    for r in rows:
        svg.dot(x(r[what]), y(r["error"]), "#9ab4d0", title=f"trial {r['trial']}: {r['config']['strategy']} {r['config']['monitor']}")
    by_trial = {r["trial"]: r for r in rows}
    svg.line([(x(by_trial[n][what]), y(by_trial[n]["error"])) for n in found["front"] if n in by_trial], BLUE)
    for name, row in found.get("proof", {}).items():
        if row["error"] > 0:
            px, py = x(row[what]), min(max(y(row["error"]), top), floor)
            svg.add("path", d=f"M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10", stroke=ORANGE, stroke_width=2)
            svg.text(px + 8, py + 4, f"{name}, unseen seeds", fill=ORANGE)
    svg.text((left + right) / 2, height - 8, f"{what}; the line is the budget", text_anchor="middle")
    svg.text(left, 12, "error to the exact run (NMSE)")
    return str(svg)


def heat_map(table: Sequence[Sequence[float]], title: str, log: bool = True, cell: int = 26) -> str:
    """A map of ``table[layer][head]``, dark where a number is large; each cell shows its number under the pointer."""
    flat = [math.log10(max(v, 1e-30)) if log else v for row in table for v in row]
    low, high = min(flat), max(flat)
    heads = max(len(row) for row in table)
    left, top = 56, 34
    svg = Svg(max(left + heads * cell + 10, 220), top + len(table) * cell + 8)
    svg.text(6, 14, title)
    svg.text(left, top - 6, "heads")
    for layer, row in enumerate(table):
        baseline = top + (layer + 0.65) * cell
        svg.text(left - 6, baseline, f"layer {layer}", text_anchor="end")
        for head, value in enumerate(row):
            part = (flat[layer * heads + head] - low) / (high - low) if high > low else 0.5
            shade = f"rgb({round(245 - 214 * part)},{round(245 - 150 * part)},{round(245 - 77 * part)})"
            place = {"x": left + head * cell, "y": top + layer * cell, "width": cell - 1, "height": cell - 1}
            svg.add("rect", f"layer {layer}, head {head}: {value:.3g}", **place, fill=shade)
            if not log:
                colour = "#fff" if part > 0.5 else INK
                svg.text(left + (head + 0.5) * cell, baseline, f"{value:.3g}", text_anchor="middle", fill=colour)
    return str(svg)
