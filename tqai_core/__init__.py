"""tqai: fewer and smaller attention computations for diffusion transformers, measured.

>>> import tqai_core as tqai
>>> handle = tqai.apply(pipe, tqai.preset("balanced"))      # doctest: +SKIP
>>> image = pipe("a prompt", num_inference_steps=24)        # doctest: +SKIP
>>> print(handle.report().to_markdown())                    # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import TqaiError
from .registry import ROLES, build, names
from .version import VERSION

if TYPE_CHECKING:
    from .config import Config, preset
    from .handle import Handle
    from .report import Report
    from .roles import Codec
    from .stream import StreamCoder
    from .types import Packed

__version__ = VERSION
__all__ = [
    "CalibratedScheduler", "Codec", "Config", "Handle", "KVCache", "Packed", "Report", "StreamCoder", "apply", "attn_processors", "codec",
    "methods", "preset",
]  # fmt: skip
# where the names are that are imported when they are asked for: torch takes a second, transformers and diffusers many
HOMES = {
    "Codec": "roles", "Config": "config", "Handle": "handle", "Packed": "types", "Report": "report", "StreamCoder": "stream",
    "preset": "config", "KVCache": "hosts.transformers.cache", "CalibratedScheduler": "hosts.diffusers.sampler",
}  # fmt: skip


def apply(target: Any, config: Config | None = None, *, steps: int | None = None) -> Handle:
    """Patch a diffusers pipeline (``transformer`` and ``transformer_2``), a bare transformer, or a language model of
    transformers (``level="kv"``: its handle makes the caches); returns the undo. At level ``kv`` a pipeline's own caches of
    references and earlier frames are packed.

    ``steps`` is the number of evaluations of a loop of your own around a bare transformer, so that the last one is
    known. Raises ValueError, with the model untouched, for what it cannot patch.
    """
    from . import hosts
    from .config import Config

    if config is not None and not isinstance(config, Config):
        raise TqaiError(f"config must be a tqai.Config, got {type(config).__name__}: use Config.from_dict or tqai.preset")
    return hosts.apply(target, config, steps)


def attn_processors(transformer: Any, config: Config, *, steps: int | None = None) -> Any:
    """``transformer.set_attn_processor(tqai.attn_processors(transformer, config))``: the plain diffusers way.

    A dict of processors, with the report and the undo as its ``handle``. ``config.level`` must be ``attention``. The
    schedule is read from the pipeline that calls; in a loop of your own give ``steps``.
    """
    from .hosts.diffusers.attach import attn_processors

    return attn_processors(transformer, config, steps)


def codec(spec: Any) -> Codec:
    """A codec from its spec, as in ``tqai.codec("turbo:bits=4")``."""
    return build("codec", spec)


def methods() -> dict[str, list[str]]:
    """Names of all scorers, strategies, monitors and codecs."""
    return {role: names(role) for role in ROLES}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
