"""Charts of the benches, drawn as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape


class Chart:
    """A frame with a horizontal and a vertical scale; ``x`` and ``y`` map values to [0, 1], from the left and from the bottom."""

    def __init__(self, width: int, height: int, left: int, right: int, x: Callable[[float], float], y: Callable[[float], float]) -> None:
        self.left, self.top, self.right, self.floor, self.height = left, 16, width - right, height - 40, height
        self.x = lambda value: left + x(value) * (self.right - left)
        self.y = lambda value: self.floor - y(value) * (self.floor - self.top)
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" '
            f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>'
        ]

    def rule(self, y: float, label: str, colour: str = "#ddd") -> None:
        """A horizontal line of the grid, with its label."""
        self.parts.append(f'<path d="M{self.left} {self.y(y):.1f}H{self.right}" stroke="{colour}"/>')
        self._text(self.left - 6, self.y(y) + 4, label, anchor="end")

    def tick(self, x: float, label: str) -> None:
        self._text(self.x(x), self.floor + 16, label, anchor="middle")

    def line(self, points: Iterable[tuple[float, float]], colour: str, dash: str = "") -> None:
        spots = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline fill="none" stroke="{colour}"{dashed} points="{spots}"/>')

    def dot(self, x: float, y: float, colour: str, label: str = "", before: bool = False) -> None:
        """A point, and its label to the right or, with ``before``, to the left."""
        self.parts.append(f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" fill="{colour}"/>')
        if label:
            self._text(self.x(x) + (-7 if before else 7), self.y(y) + 4, label, colour, "end" if before else "")

    def legend(self, across: float, row: int, label: str, colour: str) -> None:
        """A line of the legend, ``across`` pixels from the right edge of the frame."""
        self._text(self.right + across, self.top + 16 + 16 * row, label, colour)

    def svg(self, caption: str) -> str:
        self._text((self.left + self.right) / 2, self.height - 8, caption, anchor="middle")
        return "".join([*self.parts, "</svg>"])

    def _text(self, x: float, y: float, text: str, colour: str = "", anchor: str = "") -> None:
        more = (f' fill="{colour}"' if colour else "") + (f' text-anchor="{anchor}"' if anchor else "")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>')
