"""The report's picture: one row of panels a sampling. Knows no host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .run_history import Entry

WIDTH, HEIGHT = 800, 300
LEFT, RIGHT, TOP, SPLIT, FLOOR = 64, 16, 36, 190, 264
INK, GRID, COMPUTED, FORECAST, ERROR, ESTIMATE, BYTES = "#222222", "#dddddd", "#b9cfe8", "#f3f3f3", "#1f5fa8", "#d2691e", "#7a9a5a"
LOW, HIGH = -3.0, 0.5  # decades of the error axis


def draw(entries: Sequence[Entry]) -> Tensor:
    """Pictures one under the other as ComfyUI's IMAGE ``[1, height, width, 3]`` in [0, 1]."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT * max(len(entries), 1)), "white")
    pen = ImageDraw.Draw(canvas)
    for nth, entry in enumerate(entries):
        (_cache if entry.cache else _panel)(pen, entry, nth * HEIGHT)
    if not entries:
        pen.text((LEFT, TOP), "no sampling with TQAI Compress or TQAI Cache has run before this node", fill=INK)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255.0)[None]


def _cache(pen: ImageDraw.ImageDraw, entry: Entry, y0: int) -> None:
    """Layers of a packed cache: a bar of what each would take in bf16, in it what it takes, and its errors above."""
    rows: list[dict[str, Any]] = list(entry.report["per_site"].values())
    pen.text((LEFT, y0 + 6), f"{entry.head}: {_size(entry.report['bytes_held_peak'])} held", fill=INK)
    pen.text((LEFT, y0 + 20), "by layer; grey: in bf16, green: packed; dot: error of values (NMSE), dash: of keys", fill=INK)
    _scale(pen, y0)
    most = max([row["bytes_exact"] for row in rows], default=0)
    pen.text((8, y0 + SPLIT + 8), _size(most), fill=INK)
    width = (WIDTH - LEFT - RIGHT) / max(len(rows), 1)
    for i, row in enumerate(rows):
        x = LEFT + i * width
        for name, colour in (("bytes_exact", GRID), ("bytes_held", BYTES)):
            pen.rectangle((x + 1, y0 + FLOOR - row[name] / most * (FLOOR - SPLIT - 8), x + width - 1, y0 + FLOOR), fill=colour)
        _marks(pen, x + width / 2, y0, row["nmse_v"], row["nmse_k"])


def _scale(pen: ImageDraw.ImageDraw, y0: int) -> None:
    for decade in (0.001, 0.01, 0.1, 1.0):
        y = y0 + _height(decade)
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        pen.text((8, y - 6), f"{decade:g}", fill=INK)


def _marks(pen: ImageDraw.ImageDraw, x: float, y0: int, dot: float | None, dash: float | None) -> None:
    if dash:
        y = y0 + _height(dash)
        pen.line((x - 5, y, x + 5, y), fill=ESTIMATE, width=2)
    if dot:
        y = y0 + _height(dot)
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ERROR)


def _panel(pen: ImageDraw.ImageDraw, entry: Entry, y0: int) -> None:
    steps: list[dict[str, Any]] = entry.report["decisions"]
    skipped = sum(d["action"] == "forecast" for d in steps)
    pen.text((LEFT, y0 + 6), f"{entry.head}: {skipped} of {len(steps)} evaluations forecast", fill=INK)
    pen.text((LEFT, y0 + 20), "blue computed, grey forecast; dot: measured error, dash: its estimate; green: bytes held", fill=INK)
    width = (WIDTH - LEFT - RIGHT) / max(len(steps), 1)
    most = max([d.get("bytes_held", 0) for d in steps], default=0)
    _scale(pen, y0)
    pen.text((8, y0 + SPLIT + 8), _size(most), fill=INK)
    for i, d in enumerate(steps):
        x = LEFT + i * width
        colour = COMPUTED if d["action"] == "compute" else FORECAST
        pen.rectangle((x + 1, y0 + TOP + 4, x + width - 1, y0 + SPLIT - 2), fill=colour)
        if most:
            top = FLOOR - d.get("bytes_held", 0) / most * (FLOOR - SPLIT - 8)
            pen.rectangle((x + 1, y0 + top, x + width - 1, y0 + FLOOR), fill=BYTES)
        middle = x + width / 2
        _marks(pen, middle, y0, d["error"], d["error_estimate"])
        if len(steps) <= 40 or i % 5 == 0:
            pen.text((middle - 4, y0 + FLOOR + 6), str(d["step"]), fill=INK)


def _height(error: float) -> float:
    decade = min(max(math.log10(max(error, 1e-9)), LOW), HIGH)
    return SPLIT - 4 - (decade - LOW) / (HIGH - LOW) * (SPLIT - TOP - 10)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} kB"
