"""Pipeline files: JSON inside ComfyUI's own output and input folders, never elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from tqai_core.errors import TqaiError

FOLDER = "tqai"
MOST = 1_000_000  # bytes; a pipeline takes a few hundred


def inside(root: str, name: str) -> Path:
    """``name`` as a file under ``root``. ValueError for one that leads out of it, links included."""
    base = Path(root).resolve()
    path = (base / name).resolve()
    if not name or path == base or base not in path.parents:
        raise TqaiError(f"{name!r} lies outside ComfyUI's folder {base}: give a plain name")
    return path


def write(name: str, text: str) -> Path:
    """Save under ``output/tqai``; an existing file of the name is replaced in one go."""
    name = name.strip().removesuffix(".json")
    if not re.fullmatch(r"[\w][\w .-]*(/[\w][\w .-]*)*", name):
        raise TqaiError(f"file name {name!r}: use letters, digits, spaces, dots, dashes and / for folders")
    path = inside(os.path.join(folder_paths.get_output_directory(), FOLDER), f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
    return path


def listing() -> list[str]:
    """Names of pipeline files: those saved by us, and those put into the input folder."""
    found = []
    for label, root in _roots():
        base = Path(root)
        if base.is_dir():
            found += [f"{p.relative_to(base).as_posix()} [{label}]" for p in sorted(base.rglob("*.json"))]
    return found


def read(choice: str) -> str:
    """The text of a file of :func:`listing`."""
    path = locate(choice)
    if path.stat().st_size > MOST:
        raise TqaiError(f"{choice!r} is larger than a pipeline can be ({MOST:,} bytes)")
    return path.read_text()


def locate(choice: str) -> Path:
    match = re.fullmatch(r"(.*?)(?: \[(input|output)\])?", choice, re.DOTALL)
    assert match is not None
    name, label = match.group(1), match.group(2) or "output"
    path = inside(dict(_roots())[label], name)
    if path.suffix != ".json" or not path.is_file():
        known = ", ".join(listing()) or "none yet; TQAI Save Pipeline writes one"
        raise TqaiError(f"no pipeline file {choice!r}; there are: {known}")
    return path


def tables() -> list[str]:
    """Calibrations in ComfyUI's folder models/tqai."""
    base = Path(folder_paths.models_dir) / FOLDER
    return sorted(p.relative_to(base).as_posix() for p in base.rglob("*.safetensors")) if base.is_dir() else []


def table(name: str) -> str:
    """The path of a file of :func:`tables`."""
    path = inside(os.path.join(folder_paths.models_dir, FOLDER), name)
    if not path.is_file():
        known = ", ".join(tables()) or f"none yet; put what `tqai calibrate` writes into {path.parent}"
        raise TqaiError(f"no calibration {name!r} in models/{FOLDER}; there are: {known}")
    return str(path)


def _roots() -> list[tuple[str, str]]:
    return [("output", os.path.join(folder_paths.get_output_directory(), FOLDER)), ("input", folder_paths.get_input_directory())]
