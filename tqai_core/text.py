"""Text that the command and the hosts share: lists from the command line, errors in one line, where words are printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TextIO, TypeVar

T = TypeVar("T")
MAX_TOKENS = {"demo": 512, "model": 256}  # the mini writes bytes, and packing starts at 256 tokens


def comma_list(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A type for argparse: ``"flux, wan"`` -> ``("flux", "wan")``, each part as ``kind``."""

    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__}: separate the parts by commas") from None

    return parse


def lines_in(text: str) -> list[str]:
    """Its lines without the empty ones and without blanks at their ends."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def output_of(args: argparse.Namespace) -> TextIO:
    """Where a command prints its words: on stderr where ``--json`` writes to stdout."""
    return sys.stderr if args.json == "-" else sys.stdout
