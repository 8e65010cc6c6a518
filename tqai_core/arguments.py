"""Types of the command's arguments. All are checked before any work begins, and each error is one line with the cure."""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from .errors import TqaiError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises TqaiError with one line where argparse prints the usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        raise TqaiError(message if ": give " in message else f"{message}; see {self.prog} --help")


def words_of(argv: Sequence[str]) -> list[str]:
    """``argv`` for argparse: a bare ``--json`` means stdout and takes no other word but ``-`` or a name that ends in ``.json``; a
    word that begins with a negative number is the value of the option before it (``--skip-layers -1,0``)."""
    words: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[i:]]
        if i and argv[i - 1] == "--json" and (word == "-" or word.endswith(".json")):
            words[-1] = f"--json={word}"
        elif word == "--json":
            words.append("--json=-")
        elif re.fullmatch(r"-\d[\d,.-]*", word) and words and re.fullmatch(r"--[a-z-]+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def refuse_ignored(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """TqaiError for options that were given and would have no effect."""
    default = args.parser.get_default
    left_out = lambda name: getattr(args, name) in (default(name), Path(str(default(name))))  # types for places make a path of it  # noqa: E731
    if given := [f"--{name.replace('_', '-')}" for name in names if not left_out(name)]:
        raise TqaiError(f"{', '.join(given)} asked, but {why}: leave it out")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()) or not low <= int(text) <= (math.inf if high is None else high):
            raise argparse.ArgumentTypeError(f"{text[:40]}: give a whole number, {_span(low, high)}")
        return int(text)

    return parse


def number(low: float, high: float | None = None, what: str = "a number") -> Callable[[str], float]:
    """A type for argparse: a finite number from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= (math.inf if high is None else high) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text[:40]}: give {what}, {_span(low, high)}")
        return value

    return parse


def _span(low: float, high: float | None) -> str:
    return f"{low:g} or more" if high is None else f"{low} to {high}"


seed = whole(0, 2**32 - 1)


def comma_list(kind: Callable[[str], T], known: Sequence[T] = ()) -> Callable[[str], tuple[T, ...]]:
    """A type for argparse: ``"flux, wan"`` -> ``("flux", "wan")``, each part as ``kind`` and one of ``known``, if that is given."""

    def parse(text: str) -> tuple[T, ...]:
        try:
            found = tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__}: give its parts separated by commas") from None
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is empty: give one or more, separated by commas")
        if unknown := [str(part) for part in found if known and part not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown: give some of {', '.join(map(str, known))}")
        return found

    return parse


def size(text: str) -> tuple[int, ...]:
    """``"832x480x81"`` -> width, height and the number of frames, if it is there."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(re.fullmatch("[0-9]{1,5}", part) and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text[:40]}: give WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, as in 1024x1024")
    return tuple(map(int, parts))


def text_in(name: str) -> str:
    """What is in a text file. It is read once, for it may be a pipe."""
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8 text"
        raise argparse.ArgumentTypeError(f"{name}: {why}: give a text file") from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{name} is empty: give a text file with one line or more")
    return text


def lines_in(name: str) -> list[str]:
    """The lines of a text file without the empty ones and without blanks at their ends."""
    return [line.strip() for line in text_in(name).splitlines() if line.strip()]


def json_target(name: str) -> str:
    """``-`` for stdout, or the name of a file that can be written."""
    return name if name == "-" else str(out_file(name))


def out_file(name: str) -> Path:
    """A file that can be written. It may be there, and folders above it may be missing."""
    path = _place(name, "file")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder: give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} cannot be written (its mode): give the name of another file")
    return path


def out_folder(name: str) -> Path:
    """A folder that can be made or written to."""
    path = _place(name, "folder")
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a file: give the name of a folder")
    return path


def _place(name: str, what: str) -> Path:
    """The path, once a file without a name was written to the nearest folder that is there: modes do not tell what root, a
    read-only disk or /proc do."""
    if not name.strip():
        raise argparse.ArgumentTypeError(f"the name is empty: give the name of a {what}")
    path = Path(name)
    try:
        there = path if what == "folder" else path.parent
        while not _is_there(there):
            there = there.parent
        if not (path.exists() and not path.is_file() and what == "file"):  # a pipe or a device needs no folder of ours
            with tempfile.TemporaryFile(dir=there):
                pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be written ({error.strerror}): give a {what} that can") from None
    return path


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def write_out(target: str | Path, text: str) -> None:
    """``text`` into a file, or to stdout where ``target`` is ``-``. Not in one step: it may be a pipe."""
    if target == "-":
        print(text)
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n", encoding="utf-8")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TqaiError(f"{target} cannot be written ({error.strerror}): give another place") from None
