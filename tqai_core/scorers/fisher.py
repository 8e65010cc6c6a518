"""Calibrated sensitivity: what an error in a unit does to the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TqaiError
from ..files import checked, header_of, once_per_version, read_tensors
from ..modelhash import check_model
from ..registry import param
from ..roles import History, LayerScorer, StepScorer
from ..types import Step


@dataclass(frozen=True)
class Fisher(StepScorer, LayerScorer, name="fisher", paper="Gauss-Newton Fisher by Hutchinson probes (Martens 1412.1193; Hutchinson 1989)"):
    """A table of true gradient sensitivities, layer x head x K/V x sigma, made offline by ``tqai calibrate`` and tied to its
    model. The one real importance signal: rank correlation .89 to .97 with true damage by unit. Importance of a step is the
    sensitivity of its sigma band, of a layer that of its heads, both against the largest of the table.
    At level kv the keys or values of the layers that matter most get one size more.
    """

    file: str = param("", "the table that tqai calibrate wrote", file=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.file:
            raise TqaiError(
                "scorer 'fisher' needs its table: run `tqai calibrate -m MODEL -o FILE` once and give fisher:file=FILE, "
                "or take scorer 'change', which needs none"
            )

    def score(self, x: Tensor | None, step: Step, stream: History) -> float:
        table, sigmas = load(self.file)
        band = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - step.sigma))
        by_layer = table.sum((1, 2))  # [layers, bands]
        if x is None or stream.where is None or "." not in stream.where.site:
            by_step = by_layer.sum(0)
            return float(by_step[band] / by_step.max())
        layer = int(stream.where.site.rsplit(".", 1)[1])
        if layer >= len(by_layer):
            raise TqaiError(f"fisher table {self.file!r} has {len(by_layer)} layers, asked for layer {layer}: calibrate this model")
        return float(by_layer[layer, band] / by_layer.max())

    def finer(self, layer: int, layers: int, share: float) -> tuple[bool, bool]:
        """Level kv: keys and values of a layer apart, by the damage that 4 bits do to them where the table has it, else by
        their sensitivity."""
        worth = _content(self.file)[3]
        if len(worth) != layers:
            raise TqaiError(f"fisher table {self.file!r} has {len(worth)} layers, this model {layers}: calibrate this model")
        best = worth.flatten().argsort(descending=True)[: round(share * worth.numel())]
        raised = torch.zeros(worth.numel(), dtype=torch.bool).scatter_(0, best, True).view_as(worth)[layer]
        return bool(raised[0]), bool(raised[1])

    def belongs(self, model: Any) -> None:
        if (given := origin(self.file)) is not None:
            check_model(model, given, f"fisher table {self.file!r}")

    def heads(self, layer: int, sigma: float) -> Tensor:
        """Sensitivity of K and V of every head, ``fp32 [heads, 2]``, against the largest of the layer."""
        table, sigmas = load(self.file)
        unit = table[layer, :, :, min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma))]
        return unit / unit.max().clamp_min(1e-30)


@once_per_version
def _content(file: str) -> tuple[dict[str, Any], Tensor, list[float], Tensor]:
    """Header ({} where the file has none), table, sigmas and what keys and values of each layer are worth, ``fp32 [layers, 2]``: predicted
    damage at 4 bits, or summed sensitivity. TqaiError names the field that is wrong."""
    again = f"it is missing or damaged, run `tqai calibrate -m MODEL -o {file}`"
    metadata, tensors = read_tensors(file, what="fisher table", again=again)
    header = header_of(metadata, "tqai-calibration", what=f"{file}: fisher table", again=again) or {}
    checked("TableHeader", header, what=f"{file}: fisher table", again=again)
    if header and not header.get("complete"):
        raise TqaiError(f"{file!r} is a calibration that was stopped: run the same tqai calibrate command again to finish it")
    table, sigmas, damage = (tensors.get(name) for name in ("fisher", "sigmas", "damage"))
    if table is None or table.ndim != 4 or table.shape[2] != 2 or table.numel() == 0 or not _weights(table):
        raise TqaiError(f"field 'fisher' of {file!r} is no table [layers, heads, 2, bands] of finite sensitivities: calibrate again")
    if sigmas is None or sigmas.shape != table.shape[3:] or not sigmas.is_floating_point():
        raise TqaiError(f"field 'sigmas' of {file!r} must give the sigma of each of the {table.shape[3]} bands: calibrate again")
    units = table.float().sum((1, 3))
    if damage is not None:
        if damage.ndim != 5 or damage.shape[:4] != table.shape or damage.shape[4] < 4 or not _weights(damage):
            raise TqaiError(f"field 'damage' of {file!r} is no table {list(table.shape)} of 4 or more widths: calibrate again")
        units = damage[..., 3].float().sum((1, 3))
    return header, table.float(), sigmas.tolist(), units


def _weights(table: Tensor) -> bool:
    """Whether all are numbers from 0 on, and their sum is one that can be divided by."""
    return table.is_floating_point() and bool((table >= 0).all()) and 0 < float(table.float().sum()) < float("inf")


def origin(file: str, field: str = "model") -> str | None:
    """What the header of ``file`` says of the model it was calibrated on; None for a table without a header."""
    return _content(file)[0].get(field)


def load(file: str) -> tuple[Tensor, list[float]]:
    """``fisher fp32 [layers, heads, 2, bands]`` (2: key, value) and the sigma of each band."""
    return _content(file)[1:3]
