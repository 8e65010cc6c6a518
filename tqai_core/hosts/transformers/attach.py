"""Language models of transformers >= 4.56: their attention replaced, and the handle that makes their caches."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ...attention.lazy import LazyKV
from ...attention.packed import attend
from ...config import Config
from ...errors import TqaiError
from ...kv.cache import PackedKV
from ...kv.segments import Plan
from ..language import CacheHandle, calibrated, kv_config
from .cache import KVCache, PackedLayer

NAME = "tqai"
ADDED = "tqai_added_masks"  # the same attention for models whose code takes masks to be added to the scores


class LMHandle(CacheHandle):
    """A language model with our attention. ``cache()`` makes caches for ``past_key_values=``."""

    argument = "past_key_values"

    def cache(self) -> KVCache:
        """A new, empty cache."""
        return self._own(KVCache(self.model.config, self.config))

    def load(self, path: str | Path) -> KVCache:
        """A cache that was saved with this very model; see :meth:`KVCache.load`."""
        return self._own(KVCache.load(path, self.model.config, device=self.model.device, weights=_weights(self.model)))

    def _own(self, cache: KVCache) -> KVCache:
        cache.weights = _weights(self.model)
        return self.keep(cache)


def attach(model: Any, config: Config, steps: int | None = None) -> LMHandle:
    """Set the packed attention; the handle's ``remove`` restores each configuration as it was."""
    kv_config(config, f"{type(model).__name__} is a language model and takes")
    if not isinstance(model, PreTrainedModel):
        raise TqaiError(f"cannot apply tqai to a {type(model).__name__}: give a transformers model, as AutoModelForCausalLM loads it")
    for method in config.build():
        if method is not None:
            method.belongs(model)
    if (known := calibrated(config)) is not None:
        known.check(model)
    KVCache(model.config, config)  # says what cannot be packed before anything is touched
    sdpa, flex, others = (getattr(model, f"_supports_{name}", True) for name in ("sdpa", "flex_attn", "attention_backend"))
    if not getattr(model, "_can_set_attn_implementation", lambda: True)() or not (sdpa or others):
        raise TqaiError(f"{type(model).__name__} has attention of its own that cannot be replaced: pass tqai.KVCache(model.config) alone")
    if asking := sorted(name for name, kind in _attentions(model).items() if _asks_for_sdpa(kind)):
        raise TqaiError(
            f"{', '.join(asking)} of {type(model).__name__} does something else where the attention is called neither 'eager' nor 'sdpa', "
            "and tqai's has a name of its own: pass tqai.KVCache(model.config) alone"
        )
    for name, mask in ((NAME, sdpa_mask), (ADDED, eager_mask)):
        AttentionInterface.register(name, packed_attention)
        AttentionMaskInterface.register(name, mask)
    handle = LMHandle(model, config)
    for part in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        handle.on_remove(_replaced(part))
    model.set_attn_implementation(NAME if sdpa or flex else ADDED)  # DeepSeek-V4 joins a bias to its mask
    return handle


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
    if attention_mask is not None:
        kv.see(attention_mask, query.shape[2])
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


def _attentions(model: Any) -> dict[str, type]:
    """The classes of the modules that hold no decoder layers: what a model computes within a layer."""
    return {type(m).__name__: type(m) for m in model.modules() if not isinstance(m, PreTrainedModel)}


def _asks_for_sdpa(kind: type) -> bool:
    """Whether the code of a class compares the name of the attention with 'sdpa'. A branch for 'eager' alone does no harm: ours takes the
    way of 'sdpa' there."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # no source: made at run time
        return False
    return any('"sdpa"' in line for line in re.findall(r"_attn_implementation *(?:==|!=|in|not in) *[^\n]*", code))


_USERS: dict[int, tuple[list[Any], Any]] = {}  # by the id of a configuration: itself once for each handle, its own attention


def _replaced(config: Any) -> Callable[[], None]:
    """The undo of one handle. The last of several restores the configuration, in whatever order they are removed."""
    users, before = _USERS.setdefault(id(config), ([], config._attn_implementation))
    users.append(config)

    def undo() -> None:
        users.pop()
        if not users:
            config._attn_implementation_internal = before
            del _USERS[id(config)]

    return undo


def _weights(model: Any) -> str:
    """A hash of some weights: enough to tell two models of one architecture apart."""
    digest = hashlib.sha256()
    for name, p in list(model.named_parameters())[:8]:
        digest.update(name.encode() + _values(model, name, p).detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _values(model: Any, name: str, p: Tensor) -> Tensor:
    """A parameter's values. Those that accelerate has put away are in the map of its hook."""
    if p.device.type != "meta":
        return p
    module, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    maps = [there for one in getattr(hook, "hooks", [hook]) if (there := getattr(one, "weights_map", None)) is not None]
    return maps[0][leaf] if maps else torch.tensor(p.shape)  # without values: its shape is what is known
