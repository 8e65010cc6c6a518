"""Text that the command and the hosts share: errors in one line, where words are printed."""

from __future__ import annotations

import argparse
import sys
from typing import TextIO

MAX_TOKENS = {"demo": 512, "model": 256}  # the mini writes bytes, and packing starts at 256 tokens


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def output_of(args: argparse.Namespace) -> TextIO:
    """Where a command prints its words: on stderr where ``--json`` writes to stdout."""
    return sys.stderr if args.json == "-" else sys.stdout
