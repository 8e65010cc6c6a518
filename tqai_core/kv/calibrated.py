"""What a packed cache takes from a file of ``tqai calibrate``: bits by layer for keys and values, and the shapes of their errors.

Bits are shared out when a cache is made, by what each width was predicted to cost (:mod:`calibrate.caches`), so that one file serves
every budget. What lost to plain rows on windows that nothing was fitted on is not in the file.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..calibrate.cache_tables import AGAIN, DAMAGE, METRIC, SHAPES
from ..calibrate.file import Calibration
from ..codecs.rows import BITS, Rows
from ..codecs.shaped import Shaped
from ..errors import TqaiError
from ..files import once_per_version
from ..modelhash import check_model

LOW, HIGH = 2.0, 8.0


@dataclass(frozen=True)
class Shape:
    """The matrices ``A`` and ``M fp32 [H, d, d]`` of the keys or values of a layer (:mod:`codecs.shaped`), and the coders they make."""

    matrices: Tensor
    metric: Tensor | None
    name: str  # hash of the matrices
    _made: dict[tuple[int, int, str], Shaped] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, matrices: Tensor, metric: Tensor | None = None) -> Shape:
        name = hashlib.sha256(b"".join(x.half().numpy().tobytes() for x in (matrices, metric) if x is not None)).hexdigest()[:16]
        return cls(matrices.float(), None if metric is None else metric.float(), name)

    def coder(self, plain: Rows, seed: int) -> Shaped:
        """The coder of ``plain`` rows with these matrices. TqaiError for rows of another size."""
        if plain.d != self.matrices.shape[-1]:
            raise TqaiError(f"the calibration file is for head dimension {self.matrices.shape[-1]}, rows here have {plain.d}: {AGAIN}")
        key = (plain.bits, seed, str(plain.device))
        if key not in self._made:
            metric = None if self.metric is None else self.metric.to(plain.device)
            self._made[key] = Shaped(plain, self.matrices.to(plain.device), metric)
        return self._made[key]

    def __deepcopy__(self, memo: Any) -> Shape:
        return self  # copies of a cache share what belongs to the model


@dataclass(frozen=True)
class CacheCalibration:
    """``damage fp32 [layers, 2, 6]``: the predicted loss of the output from keys (0) and values (1) of 2, 3, 4, 5, 6 and 8 bits; ``shapes``
    by layer, of keys and of values, None where plain rows were better; ``model`` the hash of the model."""

    damage: Tensor
    shapes: tuple[tuple[Shape | None, Shape | None], ...]
    model: str
    path: str
    uniform: tuple[float, ...] = ()  # averages at which equal bits were no worse

    def bits(self, average: float) -> list[tuple[int, int]]:
        """Bits of keys and values of each layer, ``average`` or just below on the mean."""
        if average in BITS and any(abs(average - lost) < 0.5 for lost in self.uniform):
            return [(int(average), int(average))] * len(self.damage)
        return share_out(self.damage, average)

    def check(self, model: nn.Module) -> None:
        """TqaiError for another model."""
        check_model(model, self.model, f"calibration file {self.path!r}")

    def check_layers(self, count: int) -> None:
        """TqaiError for a model with another number of layers."""
        if len(self.damage) != count:
            raise TqaiError(f"calibration file {self.path!r} has {len(self.damage)} layers, this model {count}: run tqai calibrate on it")


def share_out(damage: Tensor, average: float) -> list[tuple[int, int]]:
    """Widths whose mean is at most ``average``: always the one more width that saves most for its bits, over the convex hull of each
    unit's curve (reverse water-filling with measured curves; Cover and Thomas 10.3.3)."""
    if not LOW <= average <= HIGH:
        raise TqaiError(f"average of {average:g} bits: give {LOW:g} to {HIGH:g}")
    units = damage.flatten(0, 1).double().tolist()
    left = round(average * len(units) * 64) / 64 - LOW * len(units)
    at = [0] * len(units)
    steps = [_hull(curve) for curve in units]
    heap = [(-gain, u, 0) for u, own in enumerate(steps) for _, gain in own[:1]]
    heapq.heapify(heap)
    while heap:
        _, u, i = heapq.heappop(heap)
        to = steps[u][i][0]
        if (cost := BITS[to] - BITS[at[u]]) > left:
            continue
        at[u], left = to, left - cost
        if i + 1 < len(steps[u]):
            heapq.heappush(heap, (-steps[u][i + 1][1], u, i + 1))
    found = [BITS[i] for i in at]
    return list(zip(found[::2], found[1::2], strict=True))


def _hull(curve: list[float]) -> list[tuple[int, float]]:
    """(index of the next width, what it saves a bit) along the lower convex hull of the damage by width."""
    points: list[int] = []
    for i, value in enumerate(curve):
        if points and value >= curve[points[-1]]:  # more bits never cost more
            continue
        points.append(i)
        while len(points) > 2 and _gain(curve, points[-3], points[-2]) <= _gain(curve, points[-2], points[-1]):
            del points[-2]
    return [(j, _gain(curve, i, j)) for i, j in pairwise(points)]


def _gain(curve: list[float], i: int, j: int) -> float:
    return (curve[i] - curve[j]) / (BITS[j] - BITS[i])


def _read(path: str) -> CacheCalibration:
    made = Calibration.load(path)
    tables, verdict = made.tensors, made.header["verdicts"].get("cache")
    if DAMAGE not in tables or verdict is None:
        raise TqaiError(f"{path} has nothing for caches, it is of a pipeline or of an older tqai: calibrate this language model again")
    keys, values, metrics = (tables[name] if name in tables else [None] * len(tables[DAMAGE]) for name in (*SHAPES, METRIC))
    made_of = lambda *matrices: None if matrices[0] is None else Shape.of(*matrices)  # noqa: E731
    shapes = tuple((made_of(k, metric), made_of(v)) for k, v, metric in zip(keys, values, metrics, strict=True))
    lost = tuple(float(trial["average"]) for trial in verdict["bits"] if trial["kept"] == "uniform")
    return CacheCalibration(tables[DAMAGE], shapes, str(made.header.get("model")), path, lost)  # type: ignore[arg-type]


load = once_per_version(_read)
