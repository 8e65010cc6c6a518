"""The libraries whose models tqai works in; the only files that import diffusers, transformers or mlx are here."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..errors import TqaiError
from ..handle import Handle
from .protocol import Host

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
