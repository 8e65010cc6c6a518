"""Pictures as SVG text, without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

INK, GRID, BLUE, ORANGE = "#222", "#ddd", "#1f5fa8", "#d2691e"


class Svg:
    """A white picture of ``width x height`` pixels that elements are added to; ``str(svg)`` is the file."""

    def __init__(self, width: int, height: int, font: int = 11) -> None:
        self.width = width
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" '
            f'font-size="{font}" fill="{INK}">'
        ]
        self.add("rect", width=width, height=height, fill="#fff")

    def add(self, tag: str, title: str = "", **attributes: Any) -> None:
        """An element; ``stroke_width=2`` is the attribute ``stroke-width``. A browser shows ``title`` under the pointer."""
        inner = f"<title>{html.escape(title)}</title>" if title else ""
        self._parts.append(f"<{tag}{_written(attributes)}>{inner}</{tag}>" if inner else f"<{tag}{_written(attributes)}/>")

    def text(self, x: float, y: float, words: str, **attributes: Any) -> None:
        self._parts.append(f"<text{_written({'x': x, 'y': y, **attributes})}>{html.escape(words)}</text>")

    def line(self, points: Iterable[tuple[float, float]], colour: str, **attributes: Any) -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", fill="none", stroke=colour, points=joined, **attributes)

    def dot(self, x: float, y: float, colour: str, radius: float = 3, title: str = "") -> None:
        self.add("circle", title, cx=x, cy=y, r=radius, fill=colour)

    def level(self, y: float, left: float, right: float, label: str, colour: str = GRID) -> None:
        """A horizontal line of the grid with its label on the left."""
        self.add("path", d=f"M{left} {y:.1f}H{right}", stroke=colour)
        self.text(left - 6, y + 4, label, text_anchor="end")

    def __str__(self) -> str:
        return "".join([*self._parts, "</svg>"])


def chart(decisions: Sequence[dict[str, Any]], width: int = 760, height: int = 190) -> str:
    """An SVG of one run: bars where a step was computed, the forecast's error (measured) and its estimate, log scale."""
    left, top, right, floor, low, high = 44, 14, width - 8, height - 26, -3.0, 0.5
    column = (right - left) / max(len(decisions), 1)
    y = lambda e: floor - (min(max(math.log10(max(e, 1e-9)), low), high) - low) / (high - low) * (floor - top)  # noqa: E731
    svg = Svg(width, height, 10)
    for e in (0.001, 0.01, 0.1, 1):
        svg.level(y(e), left, right, f"{e:g}")
    for i, d in enumerate(decisions):
        middle, colour = left + (i + 0.5) * column, "#b9cfe8" if d["action"] == "compute" else "#f3f3f3"
        title = f"step {d['step']}, sigma {d['sigma']:.3f}: {d['action']}, {d['why']}"
        place = {"x": middle - 0.4 * column, "y": top, "width": 0.8 * column, "height": floor - top}
        svg.add("rect", title, **place, fill=colour, opacity=".6")
        svg.text(middle, height - 14, str(d["step"]), text_anchor="middle")
        if d["error"]:
            svg.dot(middle, y(d["error"]), BLUE, 3.5)
        if d["error_estimate"]:
            svg.line([(middle - 4, y(d["error_estimate"])), (middle + 4, y(d["error_estimate"]))], ORANGE, stroke_width=2)
    svg.text(left, height - 2, "step: blue = computed, grey = forecast; dot = measured relative error of the forecast, dash = its estimate")
    return str(svg)


def _written(attributes: dict[str, Any]) -> str:
    text = lambda value: f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))  # noqa: E731
    return "".join(f' {name.replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
