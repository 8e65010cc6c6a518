"""The only files that import diffusers, transformers or mlx, and only when a model of theirs is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import TqaiError

if TYPE_CHECKING:
    from ..handle import Handle


def apply(target: Any, config: Config | None, steps: int | None = None) -> Handle:
    """Hand ``target`` to the adapter of the library its class comes from."""
    libraries = {cls.__module__.split(".")[0] for cls in type(target).__mro__}
    if "diffusers" in libraries:
        from .diffusers.door import attach

        return attach(target, config or Config(), steps)
    if "transformers" in libraries:
        from .transformers import door as transformers

        return transformers.attach(target, config, steps)
    if "mlx_lm" in libraries:
        from . import mlx

        return mlx.attach(target, config)
    raise TqaiError(
        f"cannot apply tqai to a {type(target).__name__}: give a diffusers pipeline (StableDiffusion3Pipeline, FluxPipeline, "
        "WanPipeline), its transformer, or a language model of transformers or mlx-lm"
    )
