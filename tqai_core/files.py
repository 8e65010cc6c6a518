"""Files of tensors with a JSON header: safetensors, one field of its metadata, a format version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import TqaiError


def read_with_header(
    path: str | Path, field: str, version: int, *, what: str, make: str, again: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors. ValueError for a damaged file, a foreign one and another format: ``what`` was expected, ``make`` says
    how one comes about, ``again`` how to renew it."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as f:
            header = json.loads((f.metadata() or {}).get(field, "null"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise TqaiError(f"{path}: not a readable {what} ({error}): {again}") from None
    if not isinstance(header, dict):
        raise TqaiError(f"{path}: field {field!r} is missing: this is no {what}; {make}")
    if header.get("format") != version:
        raise TqaiError(f"{path}: field 'format' is {header.get('format')!r}, this tqai reads {version}: upgrade or {again}")
    return header, tensors
