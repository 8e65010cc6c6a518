"""The one way into tqai for files: JSON, and safetensors with a JSON header in one field of their metadata.

Nothing looks at a value before it is checked: size, nesting and numbers of the JSON as text, then its fields by a schema
(:mod:`schemas`); of tensors dtype and shape by their readers, and that every number is finite.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from .errors import TqaiError

T = TypeVar("T")
MOST = 1_000_000  # bytes of a JSON file that people write or share; a pipeline takes a few hundred
MOST_HEADER = 16_000_000  # bytes of a JSON header or of a study
MOST_VALUES = 1_000_000  # in one JSON text: what bounds the memory that it takes
DEEPEST = 32  # lists and objects inside each other
INTEGERS = 2**63  # no field needs a larger one


def parse_json(text: str | bytes, *, what: str, again: str, most: int = MOST) -> Any:
    """Plain data. TqaiError for text that is no JSON, too long or nested too deep, for NaN, infinities and endless integers. A byte
    order mark is skipped."""
    if len(text) > most:
        raise TqaiError(f"this is no {what}: it has {len(text):,} characters, one has {most:,} at most: {again}")
    try:
        text = (text if isinstance(text, str) else text.decode()).removeprefix("\ufeff")
        opened = text.count("[") + text.count("{")
        if opened + text.count(",") > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        if opened > DEEPEST and _depth(text) > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST}")
        data = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_refuse)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair can be written nowhere
        return data
    except ValueError as error:
        raise TqaiError(f"not a readable {what}, damaged or no JSON ({str(error)[:200]}): {again}") from None


def _depth(text: str) -> int:
    """How deep lists and objects lie inside each other; brackets in strings do not count."""
    depth = deepest = 0
    quoted = False
    for found in re.finditer(r'\\.|["\[\]{}]', text, re.DOTALL):
        mark = found[0]
        if mark == '"':
            quoted = not quoted
        elif not quoted and mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not quoted and mark in "]}":
            depth -= 1
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -INTEGERS <= int(digits) < INTEGERS:
        raise ValueError(f"the integer {digits[:20]}... has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)


def _refuse(digits: str) -> NoReturn:
    raise ValueError(f"{digits[:20]} is no finite number")


def read_text(path: str | Path, *, what: str, again: str, most: int = MOST) -> str:
    """The text of a file, without a byte order mark."""
    try:
        with Path(path).expanduser().open("rb") as file:  # a device has no size: no more than ``most`` is read
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"larger than {most:,} bytes, the most that one has")
        return content.decode("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)[:200]
        raise TqaiError(f"{str(path)!r}: not a readable {what} ({why}): {again}") from None


def read_json(path: str | Path, *, what: str, again: str, most: int = MOST) -> Any:
    """:func:`parse_json` of a file."""
    try:
        return parse_json(read_text(path, what=what, again=again, most=most), what=what, again=again, most=most)
    except TqaiError as error:
        raise error if str(path) in str(error) else TqaiError(f"{path}: {error}") from None


def checked(schema: str, data: Any, *, what: str, again: str) -> Any:
    """``data``, if it is as ``schema`` of :mod:`schemas` has it. TqaiError names the first field that is not."""
    from pydantic import TypeAdapter, ValidationError  # late: `import tqai_core` needs torch alone

    from . import schemas

    model = getattr(schemas, schema)
    try:
        (model if isinstance(model, TypeAdapter) else _adapter(model)).validate_python(data)
        return data
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part)[:60] for part in first["loc"])[:300] or "the whole"
        raise TqaiError(f"{what}: field {field!r} is {repr(first['input'])[:80]} ({first['msg']}): {again}") from None


@lru_cache(maxsize=32)
def _adapter(model: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(model)


def read_tensors(
    path: str | Path, *, what: str, again: str, device: str | torch.device = "cpu", finite: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. TqaiError for a missing or damaged file, and unless ``finite`` is off for one with NaN or inf: ``what``
    was expected, ``again`` says how to renew it."""
    try:
        check_head(path, what=what, again=again)
        with safe_open(str(path), framework="pt", device=str(device)) as f:
            metadata, tensors = dict(f.metadata() or {}), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping
    except TqaiError as error:
        raise TqaiError(f"{path}: {error}") from None
    except (OSError, SafetensorError, ValueError, AttributeError, TypeError, RuntimeError, OverflowError, KeyError) as error:
        raise TqaiError(f"{path}: not a readable {what} ({str(error)[:200]}): {again}") from None
    if finite:
        check_finite(tensors, what=f"{path}: {what}", again=again)
    return metadata, tensors


def check_head(path: str | Path, *, what: str, again: str) -> None:
    """TqaiError unless a safetensors file begins with a header in bounds: before a library parses it."""
    with Path(path).open("rb") as file:
        _header(file.read(8), file.read, what, again)


def parse_tensors(blob: bytes, *, what: str, again: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """:func:`read_tensors` for the content of a file."""
    header = _header(blob[:8], lambda size: blob[8 : 8 + size], what, again)
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise TqaiError(f"not a readable {what} ({str(error)[:200]}): {again}") from None
    check_finite(tensors, what=what, again=again)
    return dict(header.get("__metadata__") or {}), tensors


def _header(first: bytes, read: Callable[[int], bytes], what: str, again: str) -> dict[str, Any]:
    """The header of a safetensors file, by its ``first`` eight bytes and what ``read`` gives after them. The library checks offsets."""
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > MOST_HEADER:
        raise TqaiError(f"not a readable {what} (no header of a safetensors file): {again}")
    header = parse_json(read(size), what=what, again=again, most=MOST_HEADER)
    metadata = header.get("__metadata__") or {} if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TqaiError(f"not a readable {what} (its header is no table of tensors): {again}")
    return header


def check_finite(tensors: Mapping[str, Tensor], *, what: str, again: str) -> None:
    """TqaiError names a tensor that has NaN or inf."""
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not _all_finite(tensor):
            raise TqaiError(f"{what}: field {name!r} has NaN or inf, it is damaged: {again}")


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor if tensor.element_size() > 1 else tensor.float()  # torch has no isfinite for numbers of eight bits
    return all(bool(part.isfinite().all()) for part in flat.reshape(-1).split(1 << 24))


def check_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], again: str
) -> Tensor:
    """The tensor ``name``, if it has ``shape`` (None: any size) and one of ``dtypes``."""
    tensor = tensors.get(name)
    if tensor is None:
        raise TqaiError(f"field {name!r} is missing: {again}")
    fits = tensor.ndim == len(shape) and all(want is None or want == size for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        wanted = [size if size is not None else "any" for size in shape]
        raise TqaiError(f"field {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {dtypes[0]} {wanted}: {again}")
    return tensor


def read_with_header(
    path: str | Path, field: str, version: int, *, what: str, make: str, again: str, device: str | torch.device = "cpu",
    finite: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Header and tensors. TqaiError for a damaged file, a foreign one and another format: ``make`` says how to get such a file."""
    metadata, tensors = read_tensors(path, what=what, again=again, device=device, finite=finite)
    header = header_of(metadata, field, what=f"{path}: {what}", again=again)
    if not isinstance(header, dict):
        raise TqaiError(f"{path}: field {field!r} is missing: this is no {what}; {make}")
    if header.get("format") != version:
        raise TqaiError(f"{path}: field 'format' is {str(header.get('format'))[:80]!r}, this tqai reads {version}: upgrade or {again}")
    return header, tensors


def header_of(metadata: Mapping[str, str], field: str, *, what: str, again: str) -> Any:
    """The JSON in a field of a file's metadata; None where it is not there."""
    return parse_json(metadata.get(field, "null"), what=f"{what}, field {field!r}", again=again, most=MOST_HEADER)


def model_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that a mini's file has of its model."""
    what, again = "mini", "install tqai-core again"
    return checked("ModelConfig", header_of(metadata, "config", what=what, again=again), what=what, again=again)


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
