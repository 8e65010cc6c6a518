"""Queries, keys and values of every self-attention, shown and replaced while a model runs; blocks with checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
def tapped(model: Any, change: Change) -> Iterator[None]:
    """While the context lasts, self-attention of layer ``i`` sees the keys and values that ``change(i, q, k, v)`` returns.

    Tensors are as attention gets them: after norms and rotary positions, text and image tokens together; of a language
    model its own key heads, before they are repeated. Works through ``scaled_dot_product_attention``: models of
    diffusers with its native attention, and any transformers model that lets its attention be set.
    """
    libraries = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    with _language(model, change) if "transformers" in libraries else _diffusion(model, change):
        yield


def blocks_of(model: Any) -> list[nn.Module]:
    """The layers in the order they run, as ``tapped`` numbers them."""
    if any(cls.__module__.startswith("transformers") for cls in type(model).__mro__):
        return list(_decoder(model).layers)
    return [block for _, block in family_of(model).layers(model)]


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """While the context lasts, every block keeps its input alone and runs again on the way back; also in eval mode."""
    with ExitStack() as undo:
        for block in blocks_of(model):
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            undo.callback(_replaced(block, again))
        yield


class _Seen(TorchFunctionMode):
    """Hands the first attention call of a module to ``change``."""

    def __init__(self, change: Change, layer: int) -> None:
        super().__init__()
        self.change, self.layer = change, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.layer >= 0:
            layer, self.layer = self.layer, -1  # a second call in one module is another attention (an adapter's)
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            given["key"], given["value"] = self.change(layer, given["query"], given["key"], given["value"])
            return func(**given)
        return func(*args, **kwargs)


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
    with _Seen(change, layer):
        return forward(*args, **kwargs)


def _replaced(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Set ``forward`` on the module itself; returns the undo."""
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


@contextmanager
def _language(model: Any, change: Change) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = change(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("tqai_tap", attention)
    AttentionMaskInterface.register("tqai_tap", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("tqai_tap")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _decoder(model: Any) -> Any:
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(found, "layers"):
        raise TqaiError(f"{type(model).__name__} has no decoder layers that tqai finds: give a causal language model of transformers")
    return found
