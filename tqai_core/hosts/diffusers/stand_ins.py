"""Blocks and attention processors with the flow around them: one class for each class of block or processor."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attention import dense
from .sites import EXACT, FORECAST, ask, show, site_of

Attend = Callable[..., Tensor]  # (q, k, v [b, h, n, d], masked, full, fast) -> [b, h, n, d]
_LOCAL = threading.local()


def stand_in(processor: Any, kernel: bool) -> Any:
    """``processor`` with the flow in front; weights it carries (IP-Adapter) are shared, not copied. ``kernel``: the site sees
    queries, keys and values too."""
    made: Any = object.__new__(_processor_class(cast(Any, type(processor)), kernel))
    made.__dict__.update(processor.__dict__)
    return made


@functools.lru_cache(maxsize=64)
def _processor_class(cls: Any, kernel: bool) -> type:
    inner: Any = cls.__call__  # type: ignore[operator]
    traced = _with_text(inner)
    fastest: Attend = lambda q, k, v, masked, full, fast: fast()  # noqa: E731
    run = _at_site(_with_attention(inner, _site_attention)) if kernel else _with_attention(traced, fastest)

    @functools.wraps(inner)  # attention modules filter their keyword arguments by this signature
    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(attn, "_tqai_mode", EXACT)
        if mode == EXACT:
            return inner(self, attn, hidden_states, *args, **kwargs)
        if mode == FORECAST and not getattr(attn, "_tqai_sparse", False):
            out = ask(attn, 0, hidden_states)
            context = args[0] if args else kwargs.get("encoder_hidden_states")
            if context is None or getattr(attn, "is_cross_attention", False):
                return out
            # the last block of SD3 throws its text away
            text = context if getattr(attn, "context_pre_only", None) is True else ask(attn, 1, context)
            return (out, text, ask(attn, 2, hidden_states)) if kwargs.get("ip_hidden_states") else (out, text)
        plain = not kernel and torch.compiler.is_compiling()
        out = (traced if plain else run)(self, attn, hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            for i, x in enumerate(out):
                if i != 1 or getattr(attn, "context_pre_only", None) is not True:
                    show(attn, i, x)
        else:
            show(attn, 0, out)
        return out

    return type(f"Tqai{cls.__name__}", (cls,), {"__call__": call, "__module__": cls.__module__})


def _rebound(function: Any, **names: Any) -> Any:
    """A copy of ``function`` that finds ``names`` in place of its own globals: a processor of any version of diffusers calls our
    attention in place of its own.

    Tried instead, on the diffusers of constraints.txt:

    - a backend in the registry of attention backends, or the context ``attention_backend``: names of backends are a closed Enum.
      A forged member is called by Flux and WAN, in place of the user's own backend, and not by SD3, whose processor calls torch;
    - a processor around the other one: queries, keys and values are made and used inside of it;
    - a TorchFunctionMode: it does not see the backends flex, flash and sage, Flux and WAN do not compile as one graph under it, and a
      forward of tiny models takes longer;
    - another function in the module of diffusers during the call: other models and threads see it too, and compiled code is
      compiled anew.
    """
    # its globals are a module of their own, by which torch.compile finds them again
    module = types.ModuleType(f"{function.__module__}.{function.__qualname__}.tqai.{'.'.join(names)}")
    vars(module).update({**function.__globals__, **names, "__name__": module.__name__})
    sys.modules[module.__name__] = module
    copy = types.FunctionType(function.__code__, vars(module), function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _with_text(inner: Any) -> Any:
    """Keys and values of constant text are projected once a generation and branch (WAN's cross-attention)."""
    project = inner.__globals__.get("_get_qkv_projections")
    if project is None or "_get_added_kv_projections" not in inner.__globals__:
        return inner

    def projections(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        held = getattr(attn, "_tqai_text", None)
        if held is not None:
            return attn.to_q(hidden_states), held[0], held[1]
        q, k, v = project(attn, hidden_states, encoder_hidden_states)
        if getattr(attn, "_tqai_keeps_text", False):
            attn._tqai_text = (k, v)
        return q, k, v

    return _rebound(inner, _get_qkv_projections=projections)


class Functional:
    """torch.nn.functional, with another attention."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def _with_attention(inner: Any, attend: Attend) -> Any:
    """The processor with ``attend`` in place of its attention. ``full`` is the one that the processor asked for; ``fast`` gives the
    same within rounding where products are faster and the backend is torch's own: sage, flash and the like stay."""
    dispatch = inner.__globals__.get("dispatch_attention_fn")

    def dispatched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [b, n, h, d]
        q, k, v = _flip(query), _flip(key), _flip(value)
        full = lambda: _flip(dispatch(query, key, value, *args, **kwargs))  # noqa: E731
        masked = bool(args) or kwargs.get("attn_mask") is not None
        options = {name: x for name, x in kwargs.items() if name != "backend"}
        fast = lambda: full() if masked or not _native(dispatch, query, kwargs) else _fast(q, k, v, full, options)  # noqa: E731
        return _flip(attend(q, k, v, masked, full, fast))

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        full = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)  # noqa: E731
        masked = attn_mask is not None
        return attend(query, key, value, masked, full, lambda: full() if masked else _fast(query, key, value, full, kwargs))

    return _rebound(inner, **({"dispatch_attention_fn": dispatched} if dispatch is not None else {"F": Functional(attention)}))


def _native(dispatch: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether diffusers' dispatcher would take torch's own attention on a CPU."""
    registry = dispatch.__globals__.get("_AttentionBackendRegistry")
    if registry is None or query.device.type != "cpu":
        return False
    backend = kwargs.get("backend") or registry.get_active_backend()[0]
    return getattr(backend, "value", backend) == "native"


def _fast(q: Tensor, k: Tensor, v: Tensor, full: Callable[[], Tensor], options: dict[str, Any]) -> Tensor:
    """``full()``, or the same within rounding where this is faster: ``q, k, v [b, h, n, d]``. Whatever else was asked for stays."""
    if any(value for key, value in options.items() if key != "scale") or not dense.wanted(q, k, v):
        return full()
    return dense.attention(q, k, v, options.get("scale"))


def _flip(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _site_attention(q: Tensor, k: Tensor, v: Tensor, masked: bool, full: Callable[[], Tensor], fast: Callable[[], Tensor]) -> Tensor:
    site, _LOCAL.site = getattr(_LOCAL, "site", None), None  # a second call in one processor is another attention
    return full() if site is None else site.attention(q, k, v, masked, full, fast)


def _at_site(run: Any) -> Any:
    """The processor with its module's site at hand. Not for compiled blocks: it breaks their graph."""

    @torch.compiler.disable
    def guarded(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        _LOCAL.site = site_of(attn)
        try:
            return run(self, attn, *args, **kwargs)
        finally:
            _LOCAL.site = None

    return guarded


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
    """A block's forward with the flow around it: what a block adds to image and text is shown to the flow, or comes from it."""

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
