"""The attention function that reads packed caches in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...attention.lazy import LazyKV
from ...attention.packed import attend
from ...kv.cache import PackedKV
from ...kv.segments import Plan
from .cache import PackedLayer


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention ``tqai`` of transformers' AttentionInterface. ``query [B, heads, Q, D]`` -> ``[B, Q, heads, Dv]``."""
    softcap, aux = kwargs.get("softcap"), kwargs.get("s_aux")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def torch_attention(k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(
            module, query, k, v, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )[0]  # fmt: skip

    def attention(kv: PackedKV, mask: Tensor | None) -> Tensor:
        return attend(query, kv, scaling=scaling, mask=mask, softcap=softcap, aux=aux).transpose(1, 2).contiguous()

    plain = softcap is None and aux is None  # what torch's own kernel can do
    if not isinstance(key, LazyKV) or not isinstance(value, LazyKV):
        if plain:
            return torch_attention(key, value), None
        kv = PackedKV(Plan(calibrate=key.shape[2] + 1))  # packs nothing
        kv.append(key, value)
        return attention(kv, attention_mask), None
    layer = key.layer
    kv = layer.kv
    if isinstance(layer, PackedLayer):
        layer.claim(module)
        if module.training and torch.is_grad_enabled():
            layer.usage.warn("no gradient flows through a packed cache: train with past_key_values=None")
    kv.observe(query)
    if plain and key.fresh is not None and value.fresh is not None:
        out = torch_attention(key.fresh, value.fresh)
    elif kwargs.get("position_bias") is not None or (dropout and module.training):
        out = torch_attention(key.dense(), value.dense())
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and not causal:
            attention_mask = query.new_zeros(1, 1, 1, kv.length)
        out = attention(kv, attention_mask)
    kv.settle()
    return out, None
