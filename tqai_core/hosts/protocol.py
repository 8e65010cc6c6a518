"""What a host is: a library whose models tqai works in."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ..config import Config
from ..handle import Handle


class Attach(Protocol):
    """The one function that a host's module must have.

    It checks everything first and raises TqaiError with the target untouched. Then it changes the target, and gives each
    change's undo to ``handle.on_remove``, so that ``handle.remove()`` leaves the target as it was, bit for bit.
    """

    def __call__(self, target: Any, config: Config, steps: int | None) -> Handle:
        """``steps``: how many evaluations the caller's own loop has, None where the host finds it out or it means nothing."""


@dataclass(frozen=True)
class Host:
    """A library, and the module that works in it. The module is imported when the first target arrives: it imports the library."""

    library: str  # first part of the names of its modules
    module: str  # has ``attach``, an :class:`Attach`
    level: str  # of the configuration that is taken where the user gives none
    targets: str  # what it takes, in words, for the error that lists all hosts

    def takes(self, target: Any) -> bool:
        """Whether the class of ``target``, or one of its bases, is the library's."""
        return any(cls.__module__.partition(".")[0] == self.library for cls in type(target).__mro__)

    def attach(self, target: Any, config: Config | None, steps: int | None) -> Handle:
        attach = cast(Attach, importlib.import_module(self.module, __package__).attach)
        return attach(target, config or Config(level=self.level), steps)
