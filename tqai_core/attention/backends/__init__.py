"""Kernels: each equals the eager form.

A table of backends, best first, stands beside the entry of each operation (:mod:`attention.packed`, :mod:`attention.sparse`); the
eager form is its last row, the reference of all others, and takes every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    name: str
    takes: Callable[..., str]  # of the operation's arguments: "" where it can run them here, else the reason why not
    run: Callable[..., Any]
