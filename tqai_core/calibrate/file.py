"""What calibration writes: one safetensors file with a JSON header, tied to its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.bases import BasesFile
from ..errors import TqaiError
from ..files import check_tensor, checked, read_with_header, write_tensors
from ..modelhash import check_model
from ..registry import build
from ..roles import Codec
from .cache_tables import AGAIN, checked_tables

FIELD, FORMAT = "tqai-calibration", 1
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)  # bits whose damage is measured
UNFINISHED = ".partial"  # of the file that a stopped calibration leaves beside the target
NAMES = ("fisher", "sigmas", "error", "damage", "bits", "mean", "scale")


@dataclass(frozen=True)
class Calibration:
    """``tensors``, by layer, head and key (0) or value (1):

    ``fisher fp32 [layers, heads, 2, bands]`` mean square gradient of the output at a number of the unit, ``sigmas [bands]``;
    ``error`` and ``damage [layers, heads, 2, bands, 8]`` what 1 to 8 bits do to a unit: mean square error of a number, and
    the predicted loss of the output; ``bits uint8 [layers, heads, 2, bands]`` the allocation; of language models ``mean`` and
    ``scale [layers, heads, d]`` of the keys, and what packed caches take (:mod:`calibrate.cache_tables`). ``bases`` are per-head KLT
    bases. ``header`` says on what all was measured.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    bases: BasesFile = field(default_factory=lambda: BasesFile({}, 4))

    def check(self, model: nn.Module) -> None:
        """TqaiError if this was measured on another model."""
        check_model(model, self.header.get("model"), "this calibration")

    def save(self, path: str | Path) -> None:
        """Write the file in one step: it is never seen half written."""
        tensors, bases = self.bases.content()
        tensors |= {name: x.contiguous() for name, x in self.tensors.items()}
        header = json.dumps({"format": FORMAT, "complete": True, **self.header})
        write_tensors(path, tensors, {FIELD: header, "tqai-bases": json.dumps(bases)})

    @staticmethod
    def load(path: str | Path, model: nn.Module | None = None) -> Calibration:
        """Read a file of :meth:`save`. ValueError for a file that is missing, partial, damaged, newer or of another model."""
        header, tensors = read(path)
        if not header.get("complete"):
            raise TqaiError(f"{path} is a calibration that was stopped: run the same tqai calibrate command again to finish it")
        checked("Calibration", header, what=f"{path}: calibration", again=AGAIN)
        units = tensors["fisher"].shape if "fisher" in tensors else ()
        if len(units) != 4 or units[2] != 2 or 0 in units:
            raise TqaiError(f"{path}: field 'fisher' is missing or damaged, it is no table [layers, heads, 2, bands]: {AGAIN}")
        found = {}
        for name in NAMES:
            if name not in tensors and name in ("mean", "scale"):
                continue
            shape = {"sigmas": units[3:], "error": (*units, len(WIDTHS)), "mean": (*units[:2], None)}
            shape |= {"damage": shape["error"], "scale": shape["mean"]}
            dtype = torch.uint8 if name == "bits" else torch.float32
            try:
                found[name] = check_tensor(tensors, name, shape.get(name, units), (dtype,), AGAIN)
            except TqaiError as error:
                raise TqaiError(f"{path}: {error}") from None
            low, high = {"mean": (-inf, inf), "bits": (1, 8)}.get(name, (0, inf))
            if not bool(((found[name] >= low) & (found[name] <= high)).all()):
                raise TqaiError(f"{path}: field {name!r} is damaged, it has numbers out of range: {AGAIN}")
        found |= checked_tables(tensors, (units[0], units[1]), str(path))
        made = Calibration(header, found, BasesFile.load(path))
        if model is not None:
            made.check(model)
        return made


def codecs_of(name: str) -> dict[int, Codec]:
    """The codec at every width."""
    return {bits: build("codec", {"name": name, "bits": bits}) for bits in WIDTHS}


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header, not checked by a schema yet, and tensors of a calibration, finished or not."""
    if not Path(path).is_file():
        raise TqaiError(f"calibration {str(path)!r} is not there: run `tqai calibrate -m MODEL -o {path}`")
    return read_with_header(path, FIELD, FORMAT, what="calibration", make="run tqai calibrate", again=AGAIN)
