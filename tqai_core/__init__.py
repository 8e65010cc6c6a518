"""tqai: fewer and smaller attention computations for diffusion transformers, measured.

>>> import tqai_core as tqai
>>> handle = tqai.apply(pipe, tqai.preset("balanced"))      # doctest: +SKIP
>>> image = pipe("a prompt", num_inference_steps=24)        # doctest: +SKIP
>>> print(handle.report().to_markdown())                    # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from . import codecs, monitors, scorers, strategies
from .config import Config, preset
from .errors import TqaiError
from .handle import Handle
from .registry import ROLES, build, discover, names
from .report import Report
from .roles import Codec
from .stream import StreamCoder
from .types import Packed
from .version import VERSION

__version__ = VERSION
__all__ = [
    "CalibratedScheduler", "Codec", "Config", "Handle", "KVCache", "Packed", "Report", "StreamCoder", "apply", "attn_processors", "codec",
    "methods", "preset",
]  # fmt: skip

for _package in (scorers, strategies, monitors, codecs):
    discover(_package)


def apply(target: Any, config: Config | None = None, *, steps: int | None = None) -> Handle:
    """Patch a diffusers pipeline (``transformer`` and ``transformer_2``), a bare transformer, or a language model of
    transformers (``level="kv"``: its handle makes the caches); returns the undo.

    ``steps`` is the number of evaluations of a loop of your own around a bare transformer, so that the last one is
    known. Raises ValueError, with the model untouched, for what it cannot patch.
    """
    from . import hosts

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
    if name == "KVCache":  # transformers is imported when it is asked for
        from .hosts.transformers.cache import KVCache

        return KVCache
    if name == "CalibratedScheduler":  # diffusers, too
        from .hosts.diffusers.sampler import CalibratedScheduler

        return CalibratedScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
