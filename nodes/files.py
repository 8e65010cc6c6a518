"""Pipeline files: JSON inside ComfyUI's own output and input folders, never elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import folder_paths

from tqai_core.errors import TqaiError
from tqai_core.files import read_text, write_text
from tqai_core.registry import ROLES, build

from .pipeline import Pipeline

FOLDER = "tqai"


def inside(root: str, name: str) -> Path:
    """``name`` as a file under ``root``. ValueError for one that leads out of it, links included."""
    base = Path(root).resolve()
    try:
        path = (base / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, links in a circle
        raise TqaiError(f"{name[:200]!r} is no file name ({error}): give a plain name") from None
    if not name or path == base or base not in path.parents:
        raise TqaiError(f"{name!r} lies outside ComfyUI's folder {base}: give a plain name")
    return path


def write(name: str, text: str) -> Path:
    """Save under ``output/tqai``; an existing file of the name is replaced in one go."""
    name = name.strip().removesuffix(".json")
    if not re.fullmatch(r"[\w][\w .-]*(/[\w][\w .-]*)*", name):
        raise TqaiError(f"file name {name!r}: use letters, digits, spaces, dots, dashes and / for folders")
    path = inside(os.path.join(folder_paths.get_output_directory(), FOLDER), f"{name}.json")
    write_text(path, text)
    return path


def choices(folders: Mapping[str, str], accepts: Callable[[Path], bool] = lambda path: True) -> list[str]:
    """The JSON files in labelled folders, as ``name [label]``."""
    return [
        f"{path.relative_to(root).as_posix()} [{label}]"
        for label, root in folders.items()
        for path in sorted(Path(root).rglob("*.json"))
        if accepts(path)
    ]


def chosen(choice: str, folders: Mapping[str, str], what: str, known: Sequence[str], cure: str) -> Path:
    """The file of one of :func:`choices`, inside its folder; without a label in the first one."""
    match = re.fullmatch(rf"(.+?)(?: \[({'|'.join(folders)})\])?", choice, re.DOTALL)
    path = inside(folders[match.group(2) or next(iter(folders))], match.group(1)) if match else None
    if path is None or path.suffix != ".json" or not path.is_file():
        raise TqaiError(f"no {what} file {choice!r}; there are: {', '.join(known) or f'none yet; {cure}'}")
    return path


def listing() -> list[str]:
    """Names of pipeline files: those saved by us, and those put into the input folder."""
    return choices(_folders())


def read(choice: str) -> str:
    """The text of a file of :func:`listing`."""
    path = chosen(choice, _folders(), "pipeline", listing(), "TQAI Save Pipeline writes one")
    return read_text(path, what="pipeline", again="save it again with TQAI Save Pipeline")


def tables() -> list[str]:
    """Calibrations in ComfyUI's folder models/tqai."""
    base = Path(folder_paths.models_dir) / FOLDER
    return sorted(p.relative_to(base).as_posix() for p in base.rglob("*.safetensors"))


def table(name: str) -> str:
    """The path of a file of :func:`tables`."""
    path = inside(os.path.join(folder_paths.models_dir, FOLDER), name)
    if not path.is_file():
        known = ", ".join(tables()) or f"none yet; put what `tqai calibrate` writes into {path.parent}"
        raise TqaiError(f"no calibration {name!r} in models/{FOLDER}; there are: {known}")
    return str(path)


def contained(pipeline: Pipeline) -> Pipeline:
    """``pipeline`` with the files that its stages name (a table, bases) as paths in models/tqai. TqaiError for files elsewhere: a shared
    workflow must not make ComfyUI read what its folders do not hold."""
    changed = {}
    for role in ROLES:
        method = build(role, spec) if (spec := getattr(pipeline, role)) else None
        for name, option in method.options().items() if method else ():
            if option["file"] and (value := getattr(method, name)) != option["default"]:
                method = replace(method, **{name: table(value)})
        if method:
            changed[role] = method.spec
    return replace(pipeline, **changed)


def _folders() -> dict[str, str]:
    return {"output": os.path.join(folder_paths.get_output_directory(), FOLDER), "input": folder_paths.get_input_directory()}
