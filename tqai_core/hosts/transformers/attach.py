"""Language models of transformers >= 4.56: their attention replaced, and the handle that makes their caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ...config import Config
from ...errors import TqaiError
from ..language import CacheHandle, kv_config
from .attention import packed_attention
from .cache import KVCache

NAME = "tqai"


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
    KVCache(model.config, config)  # says what cannot be packed before anything is touched
    if hasattr(model, "_can_set_attn_implementation") and not model._can_set_attn_implementation():
        raise TqaiError(f"{type(model).__name__} has attention of its own that cannot be replaced: pass tqai.KVCache(model.config) alone")
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    handle = LMHandle(model, config)
    for part in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        handle.on_remove(_replaced(part))
    model.set_attn_implementation(NAME)
    return handle


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
        digest.update(name.encode() + p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
