"""Pictures of calibrations and studies, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

INK, GRID, POINT, FRONT, LIMIT = "#222", "#ddd", "#9ab4d0", "#1f5fa8", "#d2691e"


def pareto(found: Mapping[str, Any], width: int = 640, height: int = 320) -> str:
    """Error (log) against what the budget is about: all trials, the front, the limit, and the proof where there is one."""
    what, limit = found["budget"]["what"], found["budget"]["limit"]
    rows = [r for r in found["trials"] if r["error"] > 0]
    left, top, right, floor = 70, 20, width - 14, height - 44
    most = max([r[what] for r in rows] + [limit]) * 1.05
    low = math.floor(min([math.log10(r["error"]) for r in rows], default=-4))
    high = math.ceil(max([math.log10(r["error"]) for r in rows], default=0))
    x = lambda v: left + v / most * (right - left)  # noqa: E731
    y = lambda e: floor - (math.log10(e) - low) / max(high - low, 1) * (floor - top)  # noqa: E731
    parts = [_open(width, height)]
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        parts.append(f'<path d="M{left} {at:.1f}H{right}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>')
    for i in range(6):
        value = most * i / 5
        label = f"{value:,.0f}" if what == "bytes" else f"{value:.2f}"
        parts.append(f'<text x="{x(value):.1f}" y="{floor + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<path d="M{x(limit):.1f} {top}V{floor}" stroke="{LIMIT}" stroke-dasharray="5 3"/>')
    by = {r["trial"]: r for r in rows}
    for r in rows:
        told = html.escape(f"trial {r['trial']}: {r['config']['strategy']} {r['config']['monitor']}", quote=True)
        parts.append(f'<circle cx="{x(r[what]):.1f}" cy="{y(r["error"]):.1f}" r="3" fill="{POINT}"><title>{told}</title></circle>')
    line = " ".join(f"{x(by[n][what]):.1f},{y(by[n]['error']):.1f}" for n in found["front"] if n in by)
    parts.append(f'<polyline fill="none" stroke="{FRONT}" points="{line}"/>')
    for name, row in found.get("proof", {}).items():
        if row["error"] > 0:
            px, py = x(row[what]), min(max(y(row["error"]), top), floor)
            parts.append(f'<path d="M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10" stroke="{LIMIT}" stroke-width="2"/>')
            parts.append(f'<text x="{px + 8:.1f}" y="{py + 4:.1f}" fill="{LIMIT}">{html.escape(name)}, unseen seeds</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">{what}; the line is the budget</text>')
    parts.append(f'<text x="{left}" y="12">error to the exact run (NMSE)</text></svg>')
    return "".join(parts)


def heat(table: Sequence[Sequence[float]], title: str, log: bool = True, cell: int = 26) -> str:
    """A map of ``table[layer][head]``, dark where it is large; each cell tells its number."""
    flat = [math.log10(max(v, 1e-30)) if log else v for row in table for v in row]
    low, high = min(flat), max(flat)
    heads = max(len(row) for row in table)
    left, top = 56, 34
    width, height = max(left + heads * cell + 10, 220), top + len(table) * cell + 8
    parts = [_open(width, height), f'<text x="6" y="14">{html.escape(title)}</text>']
    for layer, row in enumerate(table):
        parts.append(f'<text x="{left - 6}" y="{top + layer * cell + cell * 0.65:.0f}" text-anchor="end">layer {layer}</text>')
        for head, value in enumerate(row):
            part = (flat[layer * heads + head] - low) / (high - low) if high > low else 0.5
            shade = f"rgb({round(245 - 214 * part)},{round(245 - 150 * part)},{round(245 - 77 * part)})"
            told = f"layer {layer}, head {head}: {value:.3g}"
            place = f'x="{left + head * cell}" y="{top + layer * cell}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(f'<rect {place} fill="{shade}"><title>{told}</title></rect>')
            if not log:
                where = f'x="{left + head * cell + cell / 2}" y="{top + layer * cell + cell * 0.65:.0f}"'
                parts.append(f'<text {where} text-anchor="middle" fill="{"#fff" if part > 0.5 else INK}">{value:.3g}</text>')
    parts.append(f'<text x="{left}" y="{top - 6}">heads</text></svg>')
    return "".join(parts)


def _open(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="11" '
        f'fill="{INK}"><rect width="{width}" height="{height}" fill="#fff"/>'
    )
