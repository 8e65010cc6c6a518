"""Files of tensors with a JSON header: safetensors, one field of its metadata, a format version."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from .errors import TqaiError

T = TypeVar("T")


def read_tensors(
    path: str | Path, *, what: str, again: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. TqaiError for a missing or damaged file: ``what`` was expected, ``again`` says how to renew it."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as f:
            return dict(f.metadata() or {}), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise TqaiError(f"{path}: not a readable {what} ({error}): {again}") from None


def parse_tensors(blob: bytes, *, what: str, again: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """:func:`read_tensors` for the content of a file."""
    try:
        tensors = load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return dict(header.get("__metadata__") or {}), tensors
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise TqaiError(f"not a readable {what} ({error}): {again}") from None


def read_with_header(
    path: str | Path, field: str, version: int, *, what: str, make: str, again: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors. TqaiError for a damaged file, a foreign one and another format: ``make`` says how to get such a file."""
    metadata, tensors = read_tensors(path, what=what, again=again, device=device)
    try:
        header = json.loads(metadata.get(field, "null"))
    except ValueError as error:
        raise TqaiError(f"{path}: not a readable {what} ({error}): {again}") from None
    if not isinstance(header, dict):
        raise TqaiError(f"{path}: field {field!r} is missing: this is no {what}; {make}")
    if header.get("format") != version:
        raise TqaiError(f"{path}: field 'format' is {header.get('format')!r}, this tqai reads {version}: upgrade or {again}")
    return header, tensors


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step: a stopped write leaves the old file."""
    part = _part(path)
    save_file(dict(tensors), str(part), metadata)
    os.replace(part, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step."""
    part = _part(path)
    part.write_text(text)
    os.replace(part, path)


def _part(path: str | Path) -> Path:
    """The file that is written first, in the same folder, so that it can replace the other at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")


def once_per_version(read: Callable[[str], T]) -> Callable[[str], T]:
    """``read(path)``, kept in memory until the file changes on disk."""
    cached = lru_cache(maxsize=8)(lambda path, changed: read(path))
    return lambda path: cached(path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
