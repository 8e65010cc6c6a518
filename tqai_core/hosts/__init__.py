"""The libraries whose models tqai works in; the only files that import diffusers, transformers, mlx, vLLM or LMCache are
here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from ..config import Config
from ..errors import TqaiError
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
        """Whether the class of ``target``, or one of its bases, is the library's; also under the wrapper of torch.compile."""
        kind = type(getattr(target, "_orig_mod", target))
        return any(cls.__module__.partition(".")[0] == self.library for cls in kind.__mro__)

    def attach(self, target: Any, config: Config | None, steps: int | None) -> Handle:
        module = importlib.import_module(self.module, __package__)
        return cast(Handle, module.attach(target, config or Config(level=self.level), steps))


# A class with bases of two libraries belongs to the host listed first.
HOSTS = (
    Host(
        "diffusers",
        ".diffusers.attach",
        "model",
        "a diffusers pipeline (StableDiffusion3Pipeline, FluxPipeline, WanPipeline) or its transformer",
    ),
    Host("transformers", ".transformers.attach", "kv", "a language model of transformers"),
    Host("mlx_lm", ".mlx.attach", "kv", "a language model of mlx-lm"),
)


def apply(target: Any, config: Config | None, steps: int | None = None) -> Handle:
    """Attach ``target`` by the host that its class comes from."""
    for host in HOSTS:
        if host.takes(target):
            return host.attach(target, config, steps)
    known = ", ".join(host.targets for host in HOSTS)
    raise TqaiError(f"cannot apply tqai to a {type(target).__name__}: give one of {known}")
