"""What a host is: a library whose models tqai works in."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from ..config import Config
from ..handle import Handle


@dataclass(frozen=True)
class Host:
    """A library, and the module that works in its models. The module imports the library, so it is imported when it is needed.

    The module has a function ``attach(target, config, steps) -> Handle``. It checks everything first and raises TqaiError with
    the target untouched. Then it changes the target, and gives the undo of each change to ``handle.on_remove``: after
    ``handle.remove()`` the target is as it was, bit for bit. ``steps`` is the number of evaluations of the caller's own loop.
    """

    library: str  # first part of the names of its modules
    module: str
    level: str  # of the configuration that is taken where the user gives none
    targets: str  # what it takes, in words, for the error that lists all hosts

    def takes(self, target: Any) -> bool:
        """Whether the class of ``target``, or one of its bases, is the library's."""
        return any(cls.__module__.partition(".")[0] == self.library for cls in type(target).__mro__)

    def attach(self, target: Any, config: Config | None, steps: int | None) -> Handle:
        module = importlib.import_module(self.module, __package__)
        return cast(Handle, module.attach(target, config or Config(level=self.level), steps))
