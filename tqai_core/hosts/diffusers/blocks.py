"""Level block: what a block adds to image and text is shown to the flow, or comes from it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .sites import EXACT, FORECAST, ask, show


def swap_block(block: nn.Module) -> Callable[[], None]:
    """The block's class with the flow around ``forward``; returns the undo. Where hooks have replaced ``forward`` on the
    block itself (offloading), the flow goes around those, so that a forecast block is not even loaded."""
    before: Any = type(block)
    hooked = vars(block).get("forward")
    if hooked is None:
        block.__class__ = _block_class(before)
    else:
        block.forward = ours = functools.update_wrapper(functools.partial(_around(lambda _, *a, **k: hooked(*a, **k)), block), hooked)

    def undo() -> None:
        vars(block).pop("_tqai_form", None)
        if hooked is None:
            block.__class__ = before
        elif vars(block).get("forward") is ours:  # else another hook stands around it, and it passes everything through
            block.forward = hooked

    return undo


@functools.lru_cache(maxsize=64)
def _block_class(cls: Any) -> type:
    # compile_repeated_blocks and device maps know blocks by their class name
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"forward": functools.wraps(cls.forward)(_around(cls.forward)), **names})


def _around(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward with the flow around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(self, "_tqai_mode", EXACT)
        if mode == EXACT:
            return inner(self, *args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        context: Any = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if mode == FORECAST:
            image = hidden + ask(self, 0, hidden)
            if self._tqai_form == "image":
                return image
            return (None if self._tqai_form == "last" else context + ask(self, 1, context)), image
        out = inner(self, *args, **kwargs)
        if not isinstance(out, tuple):
            self._tqai_form = "image"
            show(self, 0, out - hidden)
            return out
        self._tqai_form = "last" if out[0] is None else "both"  # SD3's last block throws its text away
        show(self, 0, out[1] - hidden)
        if out[0] is not None:
            show(self, 1, out[0] - context)
        return out

    return forward
