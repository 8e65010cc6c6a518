"""Queries, keys and values of every self-attention, shown and replaced while a model runs; blocks with checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..errors import TqaiError
from ..families import family_of

Change = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # layer, q, k, v [b, heads, n, d] -> k, v


@contextmanager
def intercept_attention(model: Any, change: Change | None) -> Iterator[None]:
    """While the context lasts, self-attention of layer ``i`` gets the keys and values that ``change(i, q, k, v)`` returns.

    Tensors are as attention gets them: after norms and rotary positions, text and image tokens together; of a language
    model its own key heads, before they are repeated. Works through ``scaled_dot_product_attention``: models of
    diffusers with its native attention, and any transformers model that lets its attention be set.
    """
    change = change or (lambda layer, q, k, v: (k, v))
    with _language(model, change) if _is_language(model) else _diffusion(model, change):
        yield


def blocks_of(model: Any) -> list[nn.Module]:
    """The layers in the order in which they run, as :func:`intercept_attention` numbers them."""
    if not _is_language(model):
        return [block for _, block in family_of(model).layers(model)]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(decoder, "layers"):
        raise TqaiError(f"{type(model).__name__} has no decoder layers that tqai finds: give a causal language model of transformers")
    return list(decoder.layers)


def _is_language(model: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(model).__mro__)


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """While the context lasts, every block keeps its input alone and runs again on the way back; also in eval mode."""
    with ExitStack() as undo:
        for block in blocks_of(model):
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            undo.callback(_replaced(block, again))
        yield


@contextmanager
def skipped(model: Any, outputs: Sequence[Any]) -> Iterator[None]:
    """While the context lasts, the first layers give ``outputs`` and compute nothing."""
    with ExitStack() as undo:
        for block, out in zip(blocks_of(model), outputs, strict=False):
            undo.callback(_replaced(block, lambda *args, out=out, **kwargs: out))
        yield


class _FirstAttention(TorchFunctionMode):
    """Calls ``change`` on the first attention of a module."""

    def __init__(self, change: Change, layer: int) -> None:
        super().__init__()
        self.change, self.layer = change, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.layer >= 0:
            layer, self.layer = self.layer, -1  # a second call in one module is another attention (an adapter's)
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            given["key"], given["value"] = self.change(layer, given["query"], given["key"], given["value"])
            return func(**given)
        return func(*args, **(kwargs or {}))


@contextmanager
def _diffusion(model: Any, change: Change) -> Iterator[None]:
    with ExitStack() as undo:
        for site, _, module in family_of(model).attentions(model):
            kind, number = site.split(".")
            if kind == "attn":
                undo.callback(_replaced(module, partial(_watched, change, int(number), module.forward)))
        if hasattr(model, "set_attention_backend"):
            from diffusers.models.attention_dispatch import attention_backend

            undo.enter_context(attention_backend("native"))
        yield


def _watched(change: Change, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # entered for each module: a context around the whole run would be off on the way back, inside Tensor.backward
    with _FirstAttention(change, layer):
        return forward(*args, **kwargs)


def _replaced(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Set ``forward`` on the module itself; returns the undo."""
    before = vars(module).get("forward")
    module.forward = forward
    return partial(setattr, module, "forward", before) if before is not None else partial(delattr, module, "forward")


@contextmanager
def _language(model: Any, change: Change) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = change(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("tqai_interceptor", attention)
    AttentionMaskInterface.register("tqai_interceptor", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("tqai_interceptor")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
