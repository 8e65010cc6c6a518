"""The only files that import diffusers, transformers or mlx, and only when a model of theirs is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Config
    from ..handle import Handle


def apply(target: Any, config: Config, steps: int | None = None) -> Handle:
    """Hand ``target`` to the adapter of the library its class comes from."""
    libraries = {cls.__module__.split(".")[0] for cls in type(target).__mro__}
    if "diffusers" in libraries:
        from .diffusers import attach

        return attach(target, config, steps)
    raise ValueError(
        f"cannot apply tqai to a {type(target).__name__}: give a diffusers pipeline (StableDiffusion3Pipeline, FluxPipeline, "
        "WanPipeline) or its transformer"
    )
