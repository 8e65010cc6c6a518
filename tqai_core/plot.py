"""Pictures as SVG text, without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

INK, GRID, BLUE, ORANGE, PAPER, COMPUTED, FORECAST, FAINT = "#222", "#ddd", "#1f5fa8", "#d2691e", "#fff", "#d5e2f1", "#f8f8f8", "#9ab4d0"
# what a page shows in their place where its reader asked for a dark one; colours of cells that carry their own text stay
DARK = {
    INK: "#e4e4e4", GRID: "#444", BLUE: "#7fb2ea", ORANGE: "#f0a060", PAPER: "#16181b", COMPUTED: "#2c4a6c", FORECAST: "#222529",
    FAINT: "#4f6b8a",
}  # fmt: skip
LETTER = 6.6  # mean width in pixels of a letter of 12


class Drawing(str):
    """The text of an SVG. A template takes it as markup."""

    def __html__(self) -> str:
        return self


class Svg:
    """A picture of ``width x height`` pixels that elements are added to; ``str(svg)`` is the file. ``height`` may grow."""

    def __init__(self, width: int, height: float, font: int = 12) -> None:
        self.width, self.height, self._font = width, height, font
        self._parts: list[str] = []

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

    def mark(self, x: float, y: float, colour: str, nth: int = 0) -> None:
        """One of four shapes, 10 pixels wide, that a legend tells apart."""
        shape = ("l10 10m0 -10l-10 10", "h10v10h-10z", "m5 0l5 10h-10z", "m5 0l5 5l-5 5l-5 -5z")[nth % 4]
        self.add("path", d=f"M{x - 5:.1f} {y - 5:.1f}{shape}", stroke=colour, stroke_width=2, fill="none")

    def level(self, y: float, left: float, right: float, label: str, colour: str = GRID) -> None:
        """A horizontal line of the grid with its label on the left."""
        self.add("path", d=f"M{left} {y:.1f}H{right}", stroke=colour)
        self.text(left - 6, y + 4, label, text_anchor="end")

    def legend(self, entries: Sequence[tuple[str, str, str]], left: float) -> None:
        """Below the picture, which grows: ``(shape, colour, words)``; a shape is ``box``, ``dot``, ``line`` or the number of a mark."""
        x, y = left, self.height + 8
        for shape, colour, words in entries:
            wide = 22 + LETTER * len(words) + 14
            if x > left and x + wide > self.width:
                x, y = left, y + 18
            if shape == "box":
                self.add("rect", x=x, y=y - 9, width=12, height=11, fill=colour, stroke=GRID)
            elif shape == "dot":
                self.dot(x + 6, y - 4, colour, 3.5)
            elif shape in ("line", "dashes"):
                self.line([(x, y - 4), (x + 14, y - 4)], colour, stroke_width=2, stroke_dasharray="4 3" if shape == "dashes" else "none")
            else:
                self.mark(x + 6, y - 4, colour, int(shape))
            self.text(x + 20, y, words)
            x += wide
        self.height = y + 10

    def __str__(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height:g}" width="{self.width}" height="{self.height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="{self._font}" fill="{INK}">'
        return "".join([head, f'<rect width="{self.width}" height="{self.height:g}" fill="{PAPER}"/>', *self._parts, "</svg>"])

    def drawing(self) -> Drawing:
        return Drawing(str(self))


def chart(decisions: Sequence[dict[str, Any]], width: int = 760, height: int = 180) -> Drawing:
    """One run, log scale: columns where a step was computed, the forecast's error as measured, its estimate, and what was allowed."""
    left, top, right, floor, low, high = 48, 14, width - 8, height - 22, -3.0, 0.5
    column = (right - left) / max(len(decisions), 1)
    y = lambda e: floor - (min(max(math.log10(max(e, 1e-9)), low), high) - low) / (high - low) * (floor - top)  # noqa: E731
    svg = Svg(width, height)
    every = math.ceil(26 / column)
    for i, d in enumerate(decisions):
        middle = left + (i + 0.5) * column
        sigma = "" if d["sigma"] is None else f", sigma {d['sigma']:.3f}"
        place = {"x": middle - 0.44 * column, "y": top, "width": 0.88 * column, "height": floor - top}
        colour = COMPUTED if d["action"] == "compute" else FORECAST
        svg.add("rect", f"step {d['step']}{sigma}: {d['action']}, {d['why']}", **place, fill=colour, stroke=GRID, stroke_width=0.5)
        if i % every == 0:
            svg.text(middle, floor + 15, str(d["step"]), text_anchor="middle")
    for e, label in ((0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"), (1, "100 %")):
        svg.level(y(e), left, right, label)
    shown = [("box", COMPUTED, "computed"), ("box", FORECAST, "forecast"), ("dot", BLUE, "error of the forecast, measured where computed")]
    shown.append(("line", ORANGE, "its estimate"))
    for i, d in enumerate(decisions):
        middle = left + (i + 0.5) * column
        if d.get("tolerance"):
            svg.line([(middle - column / 2, y(d["tolerance"])), (middle + column / 2, y(d["tolerance"]))], INK, stroke_dasharray="4 3")
        if d["error_estimate"]:
            reach = min(column / 2, 5)
            svg.line([(middle - reach, y(d["error_estimate"])), (middle + reach, y(d["error_estimate"]))], ORANGE, stroke_width=2)
        if d["error"]:
            svg.dot(middle, y(d["error"]), BLUE, 3)
    if any(d.get("tolerance") for d in decisions):
        shown.append(("dashes", INK, "tolerance: forecast if the estimate is below"))
    svg.legend(shown, left - 40)
    return svg.drawing()


def charts(decisions: Sequence[dict[str, Any]]) -> list[Drawing]:
    """The same for a wide and for a narrow page."""
    return [chart(decisions), chart(decisions, 350)]


def _written(attributes: dict[str, Any]) -> str:
    text = lambda value: f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))  # noqa: E731
    return "".join(f' {name.replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
