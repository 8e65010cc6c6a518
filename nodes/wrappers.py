"""How a node of ours hangs itself around a ComfyUI model, and finds itself again in the host's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP


def wrap(clone: Any, key: str, settings: Any, wrappers: Mapping[str, Callable[..., Any]]) -> Any:
    """``clone`` of a ModelPatcher with the frozen ``settings`` in its options and ``wrappers`` by the host's names for their places."""
    clone.model_options.setdefault("transformer_options", {})[key] = settings
    for place, wrapper in wrappers.items():
        clone.add_wrapper_with_key(getattr(WrappersMP, place), key, wrapper)
    return clone


def settings_of(options: Mapping[str, Any], key: str) -> Any:
    """What :func:`wrap` left in a model's options; None where our node is not on it."""
    return options.get("transformer_options", {}).get(key)


@contextmanager
def own_options(guider: Any, key: str, run: Any) -> Iterator[dict[str, Any]]:
    """A copy of the guider's options with ``run`` in it, for one sampling: the transformer's part. The guider's own are back after it."""
    original = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(original)
    options: dict[str, Any] = guider.model_options["transformer_options"]
    options[key] = run
    try:
        yield options
    finally:
        options.pop(key, None)
        guider.model_options = original


def of_evaluation(args: Sequence[Any], kwargs: Mapping[str, Any], key: str) -> tuple[dict[str, Any], Any]:
    """The model's options in a call of PREDICT_NOISE, whose ``args`` follow latent and sigma, and our run; None outside of one."""
    options = kwargs.get("model_options") or (args[0] if args else None) or {}
    return options, settings_of(options, key)


def of_forward(args: Sequence[Any], kwargs: Mapping[str, Any], key: str) -> tuple[dict[str, Any], Any]:
    """The transformer's options in a call of APPLY_MODEL, whose ``args`` follow latent and sigma, and our run; None outside of one."""
    options = kwargs.get("transformer_options") or (args[3] if len(args) > 3 else None) or {}
    return options, options.get(key)
