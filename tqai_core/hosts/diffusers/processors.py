"""Blocks and attentions as sites of the flow.

One shared, stateless class stands in for each class of processor or block. What a module does in a call is told by plain
attributes that the root hook sets before the blocks run (``_tqai_mode``), and the flow is reached through two opaque ops
that take the site's number as a tensor: so compiled blocks need one graph for each mode and no graph break.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...attention import dense
from ...flow import Flow
from ...roles import AttentionForecaster
from ...types import Where

EXACT, FORECAST, OBSERVE = 0, 1, 2  # the module's own; from the flow; its own, shown to the flow
QUERIES = 16  # sampled for the attention entropy
SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()
_LOCAL = threading.local()


class Site:
    """One wrapped module. ``kinds`` are the tensors it returns, as far as they were seen."""

    def __init__(self, flow: Flow, name: str, module: Any, *, caches: bool, probes: bool, protected: bool, text_first: bool):
        self.flow, self.name, self.module = flow, name, module
        self.caches, self.probes, self.protected, self.text_first = caches, probes, protected, text_first
        self.kinds: list[str] = []
        self.branch, self.spare = "", False
        self.beside: str | None = None
        self.text: dict[str, Any] = {}
        number = len(SITES)
        while number in SITES:
            number += 1
        SITES[number] = self
        module._tqai_mode, module._tqai_slot = EXACT, torch.tensor(number)

    def where(self, kind: str, branch: str | None = None) -> Where:
        return Where(self.name, self.branch if branch is None else branch, kind)

    def arm(self, branch: str, beside: str | None, first: bool) -> None:
        """Set what the module does in the coming call of ``branch``; ``beside`` is the branch that ran before it."""
        flow, self.branch, self.beside, self.spare = self.flow, branch, beside, False
        self.probing = self.probes and first
        wheres = [self.where(kind) for kind in self.kinds]
        mode = OBSERVE
        if self.protected or flow.bypass_reason is not None:
            mode = EXACT
        elif self.caches and wheres:
            if all(flow.should_skip(w) for w in wheres):
                mode = FORECAST
            elif beside and not self._kernel and all(flow.should_predict_from_sibling(w, self.where(w.kind, beside)) for w in wheres):
                mode, self.spare = FORECAST, True
        self.module._tqai_mode = mode

    def disarm(self) -> None:
        self.module._tqai_mode = EXACT

    @property
    def _kernel(self) -> bool:
        return isinstance(self.flow.strategy, AttentionForecaster)

    def observe(self, kind: int, x: Tensor) -> None:
        """The module computed its ``kind``-th tensor."""
        if not self.caches or self._kernel:
            return
        name = "out" if kind == 0 else f"out{kind}"
        if name not in self.kinds:
            self.kinds.append(name)
        beside = self.where(name, self.beside) if self.beside else None
        self.flow.observe(self.where(name), x, beside, called=kind == 0)

    def recall(self, kind: int) -> Tensor:
        where = self.where(self.kinds[kind])
        if self.spare:
            return self.flow.predict_from_sibling(where, self.where(where.kind, self.beside), called=kind == 0)
        return self.flow.forecast(where, called=kind == 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masked: bool, full: Callable[[], Tensor], fast: Callable[[], Tensor]) -> Tensor:
        """Attention of ``q, k, v [b, h, n, d]``: full and shown, or sparse with the forecast residual. ``full`` is the host's own,
        ``fast`` within the rounding of it."""
        if self.probing:
            self.flow.signal("entropy", entropy(q, k))
        if not (self.caches and self._kernel):
            return full()
        flow, where = self.flow, self.where("residual")
        if masked or q.shape[-2] != k.shape[-2]:
            flow.recorder.fallback(f"{flow.model}/{where}", "a mask or cross-attention: windows are for full self-attention")
            return full()
        forecast = self.module._tqai_mode == FORECAST
        if forecast:
            near = flow.local_attention(where, q, k, v, self.text_first)
            rest = flow.forecast(where)
            return near + rest.unflatten(-1, (near.shape[1], -1)).transpose(1, 2)
        out = fast()
        if "residual" not in self.kinds:
            self.kinds.append("residual")
        near = flow.local_attention(where, q, k, v, self.text_first, out)
        flow.observe(where, (out - near).transpose(1, 2).flatten(2), against=out)
        return out


def entropy(q: Tensor, k: Tensor) -> Tensor:
    """Mean attention entropy of every head over a few queries, divided by log(keys): ``fp32 [h]`` in [0, 1]."""
    n, m = q.shape[-2], k.shape[-2]
    rows = torch.linspace(0, n - 1, min(n, QUERIES), device=q.device).round().long()
    weights = (q[:, :, rows].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return -(weights * weights.clamp_min(1e-20).log()).sum(-1).mean((0, 2)) / max(torch.tensor(float(m)).log().item(), 1e-9)


@torch.library.custom_op("tqai::observe", mutates_args=("slot",))
def _observe(x: Tensor, slot: Tensor, kind: int) -> None:
    SITES[int(slot)].observe(kind, x)


@torch.library.custom_op("tqai::recall", mutates_args=())
def _recall(like: Tensor, slot: Tensor, kind: int) -> Tensor:
    return SITES[int(slot)].recall(kind)


@_recall.register_fake
def _(like: Tensor, slot: Tensor, kind: int) -> Tensor:
    return torch.empty_like(like)


def _show(module: Any, kind: int, x: Tensor) -> None:
    if torch.compiler.is_compiling():
        _observe(x, module._tqai_slot, kind)
    else:
        SITES[int(module._tqai_slot)].observe(kind, x)


def _ask(module: Any, kind: int, like: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _recall(like, module._tqai_slot, kind)
    return SITES[int(module._tqai_slot)].recall(kind)


def stand_in(processor: Any, kernel: bool) -> Any:
    """``processor`` with the flow in front; weights it carries (IP-Adapter) are shared, not copied."""
    made: Any = object.__new__(_processor_class(cast(Any, type(processor)), kernel))
    made.__dict__.update(processor.__dict__)
    return made


@functools.lru_cache(maxsize=64)
def _processor_class(cls: Any, kernel: bool) -> type:
    inner: Any = cls.__call__  # type: ignore[operator]
    traced = _with_text(inner)
    run = _on_kernel(inner) if kernel else _on_dense(traced)

    @functools.wraps(inner)  # attention modules filter their keyword arguments by this signature
    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(attn, "_tqai_mode", EXACT)
        if mode == EXACT:
            return inner(self, attn, hidden_states, *args, **kwargs)
        if mode == FORECAST and not getattr(attn, "_tqai_sparse", False):
            out = _ask(attn, 0, hidden_states)
            context = args[0] if args else kwargs.get("encoder_hidden_states")
            if context is None or getattr(attn, "is_cross_attention", False):
                return out
            # the last block of SD3 throws its text away
            text = context if getattr(attn, "context_pre_only", None) is True else _ask(attn, 1, context)
            return (out, text, _ask(attn, 2, hidden_states)) if kwargs.get("ip_hidden_states") else (out, text)
        plain = not kernel and torch.compiler.is_compiling()
        out = (traced if plain else run)(self, attn, hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            for i, x in enumerate(out):
                if i != 1 or getattr(attn, "context_pre_only", None) is not True:
                    _show(attn, i, x)
        else:
            _show(attn, 0, out)
        return out

    return type(f"Tqai{cls.__name__}", (cls,), {"__call__": call, "__module__": cls.__module__})


def _rebound(function: Any, **names: Any) -> Any:
    """The same code with other globals: a processor of any version, its attention call led through ours."""
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


def _flip(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _fast(q: Tensor, k: Tensor, v: Tensor, full: Callable[[], Tensor], options: dict[str, Any]) -> Tensor:
    """``full()``, or the same within rounding where this is faster: ``q, k, v [b, h, n, d]``. Whatever else was asked for stays."""
    scale = options.get("scale")
    if any(value for key, value in options.items() if key != "scale") or not dense.wanted(q, k, v):
        return full()
    return dense.attention(q, k, v, scale)


def _dispatched(dispatch: Any, query: Tensor, key: Tensor, value: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """diffusers' dispatcher, or products where the backend is torch's own; sage, flash and the like stay. ``[b, n, h, d]``."""
    full = lambda: _flip(dispatch(query, key, value, *args, **kwargs))  # noqa: E731
    registry = dispatch.__globals__.get("_AttentionBackendRegistry")
    if args or registry is None or query.device.type != "cpu":
        return _flip(full())
    backend = kwargs.get("backend") or registry.get_active_backend()[0]
    if getattr(backend, "value", backend) != "native":
        return _flip(full())
    options = {name: x for name, x in kwargs.items() if name != "backend"}
    if options.get("attn_mask") is not None:
        return _flip(full())
    return _flip(_fast(_flip(query), _flip(key), _flip(value), full, options))


def _on_dense(inner: Any) -> Any:
    """The processor with its exact attention as fast as it can be here."""
    dispatch = inner.__globals__.get("dispatch_attention_fn")

    def dispatched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _dispatched(dispatch, query, key, value, args, kwargs)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        full = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)  # noqa: E731
        return full() if attn_mask is not None else _fast(query, key, value, full, kwargs)

    return _rebound(inner, **({"dispatch_attention_fn": dispatched} if dispatch is not None else {"F": Functional(attention)}))


def _on_kernel(inner: Any) -> Any:
    """The processor with our attention in place of its own. Not for compiled blocks: it breaks their graph."""
    dispatch = inner.__globals__.get("dispatch_attention_fn")

    def ours(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [b, n, h, d]
        site, _LOCAL.site = getattr(_LOCAL, "site", None), None  # a second call in one processor is another attention
        full = lambda: dispatch(query, key, value, *args, **kwargs)  # noqa: E731
        if site is None:
            return full()
        masked = kwargs.get("attn_mask") is not None or bool(args)
        fast = lambda: _flip(_dispatched(dispatch, query, key, value, args, kwargs))  # noqa: E731
        return _flip(site.attend(_flip(query), _flip(key), _flip(value), masked, lambda: _flip(full()), fast))

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        site, _LOCAL.site = getattr(_LOCAL, "site", None), None
        full = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)  # noqa: E731
        fast = lambda: _fast(query, key, value, full, kwargs)  # noqa: E731
        return full() if site is None else site.attend(query, key, value, attn_mask is not None, full, fast)

    names = {"dispatch_attention_fn": ours} if dispatch is not None else {"F": Functional(attention)}
    run = _rebound(inner, **names)

    @torch.compiler.disable
    def guarded(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        _LOCAL.site = SITES[int(attn._tqai_slot)]
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
    """A block's forward with the flow around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = getattr(self, "_tqai_mode", EXACT)
        if mode == EXACT:
            return inner(self, *args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        context: Any = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if mode == FORECAST:
            image = hidden + _ask(self, 0, hidden)
            if self._tqai_form == "image":
                return image
            return (None if self._tqai_form == "last" else context + _ask(self, 1, context)), image
        out = inner(self, *args, **kwargs)
        if not isinstance(out, tuple):
            self._tqai_form = "image"
            _show(self, 0, out - hidden)
            return out
        self._tqai_form = "last" if out[0] is None else "both"  # SD3's last block throws its text away
        _show(self, 0, out[1] - hidden)
        if out[0] is not None:
            _show(self, 1, out[0] - context)
        return out

    return forward
