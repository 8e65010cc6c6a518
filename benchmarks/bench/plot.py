"""Charts of the benches: a frame with two scales on :class:`tqai_core.plot.Svg`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tqai_core.plot import GRID, Svg


class Chart:
    """``x`` and ``y`` map values to [0, 1], from the left and from the bottom of the frame."""

    def __init__(self, width: int, height: int, left: int, right: int, x: Callable[[float], float], y: Callable[[float], float]) -> None:
        self.left, self.top, self.right, self.floor, self.height = left, 16, width - right, height - 40, height
        self.x = lambda value: left + x(value) * (self.right - left)
        self.y = lambda value: self.floor - y(value) * (self.floor - self.top)
        self.picture = Svg(width, height)

    def rule(self, y: float, label: str, colour: str = GRID) -> None:
        """A horizontal line of the grid, with its label."""
        self.picture.level(self.y(y), self.left, self.right, label, colour)

    def tick(self, x: float, label: str) -> None:
        self.picture.text(self.x(x), self.floor + 16, label, text_anchor="middle")

    def line(self, points: Iterable[tuple[float, float]], colour: str, dash: str = "") -> None:
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.picture.line([(self.x(a), self.y(b)) for a, b in points], colour, **dashed)

    def dot(self, x: float, y: float, colour: str, label: str = "", before: bool = False) -> None:
        """A point, and its label to the right or, with ``before``, to the left."""
        self.picture.dot(self.x(x), self.y(y), colour, 3.5)
        if label:
            side = {"text_anchor": "end"} if before else {}
            self.picture.text(self.x(x) + (-7 if before else 7), self.y(y) + 4, label, fill=colour, **side)

    def legend(self, across: float, row: int, label: str, colour: str) -> None:
        """A line of the legend, ``across`` pixels from the right edge of the frame."""
        self.picture.text(self.right + across, self.top + 16 + 16 * row, label, fill=colour)

    def svg(self, caption: str) -> str:
        self.picture.text((self.left + self.right) / 2, self.height - 8, caption, text_anchor="middle")
        return str(self.picture)
