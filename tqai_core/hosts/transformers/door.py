"""transformers >= 4.56: :class:`KVCache`, and the attention that reads it in place."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...attention.backends import native
from ...attention.lazy import LazyKV
from ...attention.tiers import attend
from ...config import Config
from ...errors import TqaiError
from ...files import read_with_header
from ...handle import Handle
from ...kv.cache import FLUSH, PackedKV, Plan
from ...kv.layers import chosen, strong_layers
from ...kv.policy import Policy, policy
from ...registry import build
from ...report import Report
from ...types import nbytes, tensors_in

NAME = "tqai"
FORMAT = 2


class PackedLayer(DynamicLayer):
    """One layer of a :class:`KVCache` that packs."""

    is_croppable = True

    def __init__(self, plan: Plan, cache: KVCache, index: int, methods: Policy | None = None) -> None:
        super().__init__()
        self.kv, self.index = PackedKV(plan, methods), index
        self.is_initialized = False
        self._cache = weakref.ref(cache)
        self._module: Any = None  # whose keys these are

    def __repr__(self) -> str:
        return f"PackedLayer(k{self.kv.plan.bits_k}v{self.kv.plan.bits_v}, {self.kv.length} tokens)"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv.start(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; the answer has the dense shape and no storage (:class:`~tqai_core.attention.lazy.LazyKV`)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = self.kv.length == 0
        self.kv.append(key_states, value_states)
        cache = self._cache()
        if cache is not None:
            cache._step(self, key_states.shape[2])
        return (
            LazyKV(self, "k", key_states, self.kv.length, key_states if fresh else None),
            LazyKV(self, "v", value_states, self.kv.length, value_states if fresh else None),
        )

    def claim(self, module: Any) -> None:
        """Raises ValueError when another model's attention reads this layer."""
        known = self._module() if self._module is not None else None
        if known is None:
            self._module = weakref.ref(module)
        elif known is not module:
            raise TqaiError("this cache was filled by another model: call cache.reset(), or make one with tqai.KVCache(model.config)")

    def made_dense(self) -> None:
        cache = self._cache()
        if cache is not None:
            cache._warn(
                "this attention cannot read a packed cache, so dense keys and values are made at every step; "
                "`handle = tqai.apply(model, config)` sets the one that can"
            )

    def get_seq_length(self) -> int:
        return self.kv.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before 5.0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else len(query_length)  # cache positions before 5.0
        return self.kv.length + count, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep, as before 5.0."""
        self.kv.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(self.kv.length - tokens_to_remove, 0))

    def reset(self) -> None:
        self.kv.clear()
        self.is_initialized, self._module = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kv.map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.kv.map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kv.map_batch(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self.kv.move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.kv.move(self.device)


class KVCache(Cache):
    """A packed KV cache for ``past_key_values=``.

    ``model_config`` is ``model.config``; ``config`` a ``tqai.Config(level="kv", codec="turbo:bits_k=4,bits_v=4", sink=4, recent=64)``.
    Works with any attention; it is read in place once ``tqai.apply(model, config)`` has set ours. Layers that are no
    plain full attention (sliding windows, linear attention) keep transformers' own classes, and so do ``skip_layers``.
    Raises ValueError for a head dimension it cannot pack and, unless ``calibrate=0``, for a model without rotary positions.
    """

    def __init__(self, model_config: Any, config: Config | None = None) -> None:
        config = Config(level="kv") if config is None else config
        if not isinstance(config, Config) or config.level != "kv":
            raise TqaiError(f"KVCache wants a tqai.Config(level='kv', ...), got {getattr(config, 'level', type(config).__name__)!r}")
        if not hasattr(model_config, "get_text_config"):
            raise TqaiError(f"KVCache wants model.config first, got {type(model_config).__name__}")
        if getattr(model_config, "is_encoder_decoder", False):
            raise TqaiError(f"{model_config.model_type} is an encoder-decoder: packed caches are for decoders; use its own cache")
        text = model_config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=model_config).layers) or [DynamicLayer() for _ in range(text.num_hidden_layers)]
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        codec = build("codec", config.codec)
        skip = chosen(config.skip_layers, len(layers))
        self.config = config
        self.model_key = _key(text)
        self.weights = ""  # a hash of the model's weights, where a handle knows it
        self._fallbacks: list[dict[str, str]] = []
        if codec.name != "exact":
            bits_k, bits_v = codec.bits_k or codec.bits, codec.bits_v or codec.bits
            if full:
                _check(text, Plan(bits_k, bits_v, seed=codec.seed), config)
            strong = strong_layers(full, config.protect)
            for i in full:
                if i in skip:
                    continue
                plan = Plan(
                    max(bits_k, 8 if i in strong else 0), max(bits_v, 8 if i in strong else 0),
                    config.sink, config.recent, config.calibrate, codec.seed,
                )  # fmt: skip
                methods, plan = policy(config, plan, i, len(layers))
                layers[i] = PackedLayer(plan, self, i, methods)
        for i, layer in enumerate(layers):
            if not isinstance(layer, PackedLayer):
                why = (
                    "codec exact" if codec.name == "exact" else "skip_layers" if i in skip else f"{type(layer).__name__} keeps its own form"
                )
                self._fallbacks.append({"where": f"attn.{i}", "why": why})
        super().__init__(layers=layers)
        self._zero()

    def _zero(self) -> None:
        self._warnings: list[str] = []
        self._calls = self._evaluations = self._peak = 0
        self._began: float | None = None
        self._cpu = 0.0

    @property
    def packed_layers(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            raise TqaiError(f"layer {layer_idx} asked, this cache has {len(self.layers)}: it was made for another model's config")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        if -tokens_to_remove > length:  # before any layer is touched
            raise TqaiError(f"cannot crop {-tokens_to_remove} tokens: the cache keeps {length}; crop at most that many, or reset() it")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Empty, for another prompt or another model of the same shape."""
        super().reset()
        self._zero()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, all layers, statistics included."""
        return sum(layer.kv.nbytes if isinstance(layer, PackedLayer) else nbytes(vars(layer)) for layer in self.layers)

    @property
    def materialised(self) -> int:
        """Times that dense keys or values were made of packed ones: 0 while they are read in place."""
        return sum(layer.kv.decoded for layer in self.packed_layers)

    def report(self) -> Report:
        """Since the last reset. ``per_site`` tells each layer's bits, tokens and bytes, and how often dense values were made."""
        self._peak = max(self._peak, self.nbytes)
        report = Report(calls=self._calls, evaluations=self._evaluations, bytes_held_peak=self._peak, seconds_cpu=self._cpu)
        report.warnings = list(self._warnings)
        report.fallbacks = list(self._fallbacks)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PackedLayer):
                report.bytes_exact += sum(2 * x.numel() for x in tensors_in(vars(layer)))
                continue
            kv = layer.kv
            exact = 0
            if kv.keys is not None and kv.values is not None:
                exact = 2 * kv.length * kv.keys.shape[0] * kv.keys.shape[1] * (kv.keys.shape[3] + kv.values.shape[3])
            report.bytes_exact += exact
            report.per_site[f"attn.{i}"] = {
                "bits_k": kv.plan.bits_k, "bits_v": kv.plan.bits_v, "tokens": kv.length, "tokens_packed": kv.packed,
                "bytes_held": kv.nbytes, "bits_held": round(16 * kv.nbytes / exact, 4) if exact else 0.0, "materialised": kv.decoded,
            }  # fmt: skip
            if kv.policy is not None:
                report.per_site[f"attn.{i}"] |= kv.policy.report(kv)
                report.decisions += kv.policy.decisions
                report.fallbacks += [{"where": f"attn.{i}", "why": why} for why in kv.policy.fallbacks()]
            if kv.exact_why:
                report.fallbacks.append({"where": f"attn.{i}", "why": f"{kv.exact_why}: held exact from there"})
        if self._evaluations and self.packed_layers and not any(layer.kv.packed for layer in self.packed_layers):
            wait = max(self.config.calibrate, self.config.sink + self.config.recent + FLUSH)
            report.warnings.append(f"nothing is packed yet: {self.get_seq_length()} tokens are held, packing starts at {wait}")
        if any(layer.kv.packed for layer in self.packed_layers) and (why := native.status()):
            report.warnings.append(why)
        return report

    def _step(self, layer: PackedLayer, count: int) -> None:
        self._calls += 1
        if layer is not self.packed_layers[0]:
            return
        now = time.process_time()
        self._began = now if self._began is None else self._began
        self._cpu = now - self._began
        self._evaluations += 1
        if count > 1 or layer.kv.length % FLUSH == 0:  # walking every tensor at every token would cost more than it tells
            self._peak = max(self._peak, self.nbytes)

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)
            warnings.warn(f"tqai: {text}", UserWarning, stacklevel=2)

    # -- files

    def save(self, path: str | Path) -> None:
        """Write all layers to a safetensors file: a prompt cache on disk."""
        tensors: dict[str, Tensor] = {}
        headers: list[Any] = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer):
                own, header = layer.kv.state()
            elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                own = {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}
                header = {"length": layer.get_seq_length()}
            else:
                raise TqaiError(f"layer {i} is a {type(layer).__name__}, whose state has no file form: keep this cache in memory")
            headers.append({"kind": type(layer).__name__, **header})
            tensors |= {f"layers.{i}.{name}": tensor.contiguous().clone() for name, tensor in own.items()}
        header = {"format": FORMAT, "model": self.model_key, "weights": self.weights, "config": self.config.to_dict(), "layers": headers}
        save_file(tensors, str(path), {"tqai-kv": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, model_config: Any, *, device: str | torch.device = "cpu", weights: str = "") -> KVCache:
        """A cache from a file of :meth:`save`, ready to be continued. ValueError for a file of another model, or a damaged one."""
        header, tensors = read_with_header(
            path, "tqai-kv", FORMAT, what="cache file", make="write one with cache.save(path)", again="save the cache again", device=device
        )
        try:
            cache = cls(model_config, Config.from_dict(header["config"]))
            for field, had in header["model"].items():
                if cache.model_key.get(field) != had:
                    raise TqaiError(
                        f"the file was written for a model with {field}={had!r}, this one has {cache.model_key.get(field)!r}: "
                        "load it with the model that filled it"
                    )
            if weights and header["weights"] and weights != header["weights"]:
                raise TqaiError("the file was written with other weights of this architecture: load it with the model that filled it")
            cache.weights = weights or header["weights"]
            for i, (layer, own) in enumerate(zip(cache.layers, header["layers"], strict=True)):
                start = f"layers.{i}."
                parts = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
                if own["kind"] != type(layer).__name__:
                    raise TqaiError(f"layer {i} of the file is a {own['kind']}, here it is a {type(layer).__name__}")
                if isinstance(layer, PackedLayer):
                    layer.kv.restore(parts, own)
                elif parts:
                    layer.lazy_initialization(parts["keys"], parts["values"])
                    layer.keys, layer.values = parts["keys"], parts["values"]
                    if hasattr(layer, "cumulative_length"):
                        layer.cumulative_length = own["length"]
                if isinstance(layer, PackedLayer) and layer.kv.keys is not None:
                    layer.dtype, layer.device, layer.is_initialized = layer.kv.keys.dtype, layer.kv.keys.device, True
        except (KeyError, TypeError) as error:
            raise TqaiError(f"{path}: damaged header or missing tensor ({error}): save the cache again") from None
        except ValueError as error:
            raise TqaiError(f"{path}: {error}") from None
        return cache


def _key(text: Any) -> dict[str, Any]:
    """What two models must share for one to read the other's cache."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {name: getattr(text, name, None) for name in names}


def _check(text: Any, plan: Plan, config: Config) -> None:
    d = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    PackedKV(plan).start(torch.empty(1, 1, 0, d), torch.empty(1, 1, 0, d))
    rotary = any(name.startswith(("rope_", "rotary_", "partial_rotary")) for name in text.to_dict()) and not getattr(text, "alibi", False)
    if config.calibrate and not rotary:
        raise TqaiError(
            f"{text.model_type} has no rotary positions, and the scaling of keys pools over rotary pairs: "
            "give Config(level='kv', calibrate=0), which stores keys as they are"
        )


# -- attention


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function ``tqai`` of transformers' AttentionInterface. ``query [B, heads, Q, D]`` -> ``[B, Q, heads, Dv]``."""
    softcap, aux = kwargs.get("softcap"), kwargs.get("s_aux")
    own = softcap is None and aux is None  # what torch's own kernel can do
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    if not isinstance(key, LazyKV) or not isinstance(value, LazyKV):
        if own:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **plain)
        kv = PackedKV(Plan(calibrate=key.shape[2] + 1))
        kv.append(key, value)
        return _out(attend(query, kv, scaling=scale, mask=attention_mask, softcap=softcap, aux=aux)), None
    layer = key.layer
    kv = layer.kv
    if isinstance(layer, PackedLayer):
        layer.claim(module)
    if module.training and torch.is_grad_enabled() and isinstance(layer, PackedLayer) and (cache := layer._cache()) is not None:
        cache._warn("no gradient flows through a packed cache: train with past_key_values=None")
    kv.observe(query)
    if own and key.fresh is not None and value.fresh is not None:
        out = sdpa_attention_forward(module, query, key.fresh, value.fresh, attention_mask, **plain)[0]
    elif kwargs.get("position_bias") is not None or (dropout and module.training):
        out = sdpa_attention_forward(module, query, key.dense(), value.dense(), attention_mask, **plain)[0]
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and not causal:
            attention_mask = query.new_zeros(1, 1, 1, kv.length)
        out = _out(attend(query, kv, scaling=scale, mask=attention_mask, softcap=softcap, aux=aux))
    kv.settle()
    return out, None


def _out(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


class LMHandle(Handle):
    """A language model with our attention. ``cache()`` makes caches for ``past_key_values=``."""

    def __init__(self, model: Any, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._last: KVCache | None = None
        self._report = Report(warnings=["nothing has run yet: handle.cache() makes a cache for past_key_values="])

    def cache(self) -> KVCache:
        """A new, empty cache."""
        return self._keep(KVCache(self.model.config, self.config))

    def load(self, path: str | Path) -> KVCache:
        """A cache that was saved with this very model; see :meth:`KVCache.load`."""
        return self._keep(KVCache.load(path, self.model.config, device=self.model.device, weights=_weights(self.model)))

    def _keep(self, cache: KVCache) -> KVCache:
        cache.weights = _weights(self.model)
        self._caches.add(cache)
        self._last = cache
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes held by all living caches."""
        return sum(cache.nbytes for cache in self._caches)

    def report(self) -> Report:
        """Of the cache made last, which the handle keeps until it is removed."""
        return self._last.report() if self._last is not None else self._report

    def remove(self) -> None:
        self._report, self._last = self.report(), None
        super().remove()


def attach(model: Any, config: Config, steps: int | None = None) -> LMHandle:
    """Set the packed attention; the handle's ``remove`` restores each configuration as it was."""
    if config.level != "kv":
        raise TqaiError(f"{type(model).__name__} is a language model: give tqai.Config(level='kv', ...), got level={config.level!r}")
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
    seen = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for part in seen.values():
        handle.on_remove(lambda part=part, was=part._attn_implementation: setattr(part, "_attn_implementation_internal", was))  # type: ignore[misc]
    model.set_attn_implementation(NAME)
    return handle


def _weights(model: Any) -> str:
    """A hash of some weights: enough to tell two models of one architecture apart."""
    digest = hashlib.sha256()
    for name, p in list(model.named_parameters())[:8]:
        digest.update(name.encode() + p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
