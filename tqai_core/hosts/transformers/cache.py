"""transformers >= 4.56: :class:`KVCache`, its layers, its file."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ...attention.backends import native
from ...attention.lazy import LazyKV
from ...config import Config
from ...errors import TqaiError
from ...files import check_tensor, checked, read_with_header
from ...kv.cache import PackedKV, check_range
from ...kv.policy import policy
from ...kv.segments import AGAIN, FLOATS, Plan
from ...report import Report
from ...types import nbytes, tensors_in
from ..language import LayerFigures, Usage, cache_report, calibrated, kv_config, layer_plans

FORMAT = 2


class PackedLayer(DynamicLayer):
    """One layer of a :class:`KVCache` that packs."""

    is_croppable = True

    def __init__(self, kv: PackedKV) -> None:
        super().__init__()
        self.kv, self.usage = kv, Usage()
        self.is_initialized = False
        self._module: Any = None  # whose keys these are

    def __repr__(self) -> str:
        return f"PackedLayer(k{self.kv.plan.bits_k}v{self.kv.plan.bits_v}, {self.kv.length} tokens)"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv.start(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens. Returns all keys and values in their dense shape, without storage: :class:`~tqai_core.attention.lazy.LazyKV`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = self.kv.length == 0
        self.kv.append(key_states, value_states)
        return LazyKV.pair(self, key_states, value_states, fresh)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a copy, or what a file gives back, belongs to the next model that reads it

    def claim(self, module: Any) -> None:
        """TqaiError where another model's attention reads this layer; layers of one model may share it (Gemma 3n and 4)."""
        known = self._module() if self._module is not None else None
        if known is module or getattr(module, "is_kv_shared_layer", False):
            return
        if known is None:
            self._module = weakref.ref(module)
        else:
            raise TqaiError("this cache was filled by another model: call cache.reset(), or make one with tqai.KVCache(model.config)")

    def made_dense(self) -> None:
        self.usage.warn(
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
    It works with any attention; after ``tqai.apply(model, config)`` the model's attention reads it in place. Layers of another
    kind than plain full attention (sliding windows, linear attention) keep transformers' own classes, and so do ``skip_layers``.
    TqaiError for a head dimension that cannot be packed and, unless ``calibrate=0``, for a model without rotary positions.
    """

    def __init__(self, model_config: Any, config: Config | None = None) -> None:
        self.config = config = kv_config(config, "KVCache wants")
        if not hasattr(model_config, "get_text_config"):
            raise TqaiError(f"KVCache wants model.config first, got {type(model_config).__name__}")
        if getattr(model_config, "is_encoder_decoder", False):
            raise TqaiError(f"{model_config.model_type} is an encoder-decoder: packed caches are for decoders; use its own cache")
        text = model_config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=model_config).layers) or [DynamicLayer() for _ in range(text.num_hidden_layers)]
        self.model_key = _key(text)
        self.weights = ""  # a hash of the model's weights, where a handle knows it
        self.plans = layer_plans(config, ["" if type(layer) is DynamicLayer else type(layer).__name__ for layer in layers])
        packed = [(i, plan) for i, plan in enumerate(self.plans) if isinstance(plan, Plan)]
        self._text = text
        if packed and getattr(text, "num_attention_heads", None) is None:
            raise TqaiError(f"{text.model_type} has no attention heads, so no keys and values to pack: use its own cache")
        for head_dim, plan in dict.fromkeys((_of_layer(text, "head_dim", i), plan) for i, plan in packed):
            _check(text, head_dim or text.hidden_size // text.num_attention_heads, plan)
        known = calibrated(config)
        for i, plan in packed:
            methods, plan = policy(config, plan, i, len(layers))
            layers[i] = PackedLayer(PackedKV(plan, methods, (None, None) if known is None else known.shapes[i]))
        super().__init__(layers=layers)
        self._count_anew()

    def _count_anew(self) -> None:
        self.usage, self._flex = Usage(), False
        for layer in self.packed_layers:
            layer.usage = self.usage

    @property
    def packed_layers(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            raise TqaiError(f"layer {layer_idx} asked, this cache has {len(self.layers)}: it was made for another model's config")
        layer = self.layers[layer_idx]
        if not isinstance(layer, PackedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if first := self.usage.count(layer_idx):  # what cannot change within an evaluation of the model
            if getattr(torch.compiler, "is_exporting", bool)():
                raise TqaiError(
                    "torch.export met a KVCache: packing depends on the tokens that come, which an exported graph cannot hold; "
                    "export the model with transformers' DynamicCache or StaticCache"
                )
            self._flex = self._text._attn_implementation == "flex_attention"  # it is compiled, and takes plain tensors alone
        if self.offloading:
            out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        else:
            out = layer.update(key_states, value_states)
        # walking every tensor at every token would cost more than it tells
        if first and (key_states.shape[2] > 1 or layer.kv.length % layer.kv.plan.flush == 0):
            self.usage.peak = max(self.usage.peak, self.nbytes)
        return tuple(x.dense() for x in out) if self._flex else out  # type: ignore[attr-defined, return-value]

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        if (query_length if isinstance(query_length, int) else len(query_length)) == 0:  # generate() cut the whole prompt off
            raise TqaiError(
                f"the cache keeps {self.get_seq_length()} tokens and the prompt has none after them: give the whole text so far and what "
                "follows, crop the cache with cache.crop(-count), or empty it with cache.reset()"
            )
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if self._text.model_type == "mpt" and length > self._text.max_seq_len:  # its table of position biases ends there
            raise TqaiError(f"mpt has positions for {self._text.max_seq_len} tokens, {length} are asked: give a shorter text")
        return length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep, as in older transformers."""
        length = self.get_seq_length()
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if gone > length:  # before any layer is touched
            raise TqaiError(f"cannot crop {gone} tokens: the cache keeps {length}; crop at most that many, or reset() it")
        super().crop(-gone)

    def reset(self) -> None:
        """Empty, for another prompt or another model of the same shape."""
        super().reset()
        self._count_anew()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, all layers, statistics included."""
        return sum(layer.kv.nbytes if isinstance(layer, PackedLayer) else nbytes(vars(layer)) for layer in self.layers)

    @property
    def materialised(self) -> int:
        """Times that dense keys or values were made of packed ones: 0 while they are read in place."""
        return sum(layer.kv.decoded for layer in self.packed_layers)

    def report(self) -> Report:
        """Since the last reset. ``per_site`` has the bits, tokens and bytes of each layer, and how often dense values were made."""
        self.usage.peak = max(self.usage.peak, self.nbytes)
        packed = [(i, layer.kv) for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)]
        others = sum(x.numel() for layer in self.layers if not isinstance(layer, PackedLayer) for x in tensors_in(vars(layer)))
        figures = [LayerFigures(i, x.plan, x.length, x.packed, x.nbytes, x.exact if x.length else (), x.decoded) for i, x in packed]
        report = cache_report(self.config, self.plans, self.usage, figures, others)
        for i, kv in packed:
            where = f"attn.{i}"
            report.per_site[where] |= kv.policy.report(kv.tiers() if kv.length else ())
            report.decisions += kv.policy.decisions
            report.fallbacks += [{"where": where, "why": why} for why in kv.policy.fallbacks()]
            if kv.exact_why:
                report.fallbacks.append({"where": where, "why": f"{kv.exact_why}: held exact from there"})
        if any(kv.packed for _, kv in packed) and (why := native.status()):
            report.warnings.append(why)
        return report

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
        """A cache from a file of :meth:`save`, ready to be continued. TqaiError for a file of another model, or a damaged one."""
        header, tensors = read_with_header(
            path,
            "tqai-kv",
            FORMAT,
            what="cache file",
            make="write one with cache.save(path)",
            again=AGAIN,
            device=device,
            finite=False,
        )
        checked("Cache", header, what=f"{path}: cache file", again=AGAIN)
        try:
            cache = cls(model_config, Config.from_dict(header["config"]))
            if len(cache.layers) != len(header["layers"]):
                raise TqaiError(f"the file has {len(header['layers'])} layers, this model {len(cache.layers)}: {AGAIN}")
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
                    if (keys := layer.kv.keys) is not None:
                        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
                elif parts:
                    keys = check_tensor(parts, "keys", (None,) * 4, FLOATS, AGAIN)
                    values = check_tensor(parts, "values", (*keys.shape[:3], None), (keys.dtype,), AGAIN)
                    fewer = hasattr(layer, "cumulative_length")  # a sliding window holds the last of them
                    if keys.shape[2] > own["length"] or (keys.shape[2] != own["length"] and not fewer):
                        raise TqaiError(f"field 'length' of layer {i} says {own['length']}, its tensors hold {keys.shape[2]}: {AGAIN}")
                    check_range(parts)
                    layer.lazy_initialization(keys, values)
                    layer.keys, layer.values = keys, values
                    if hasattr(layer, "cumulative_length"):
                        layer.cumulative_length = own["length"]
        except TqaiError as error:
            raise TqaiError(f"{path}: {error}") from None
        return cache


def _key(text: Any) -> dict[str, Any]:
    """What two models must share for one to read the other's cache."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {name: _of_model(text, name) for name in names}


def _of_model(text: Any, name: str) -> Any:
    """An attribute of a configuration, or None; a list where layers differ in it."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError of transformers >= 5
        return [_of_layer(text, name, i) for i in range(text.num_hidden_layers)]


def _of_layer(text: Any, name: str, layer: int) -> Any:
    """The same of one layer."""
    own = getattr(text, "per_layer_config", None)  # transformers >= 5
    return getattr(text if own is None else own[layer], name, None)


def _check(text: Any, head_dim: int, plan: Plan) -> None:
    """TqaiError for a model whose keys and values cannot be packed so."""
    PackedKV(plan).start(torch.empty(1, 1, 0, head_dim), torch.empty(1, 1, 0, head_dim))
    rotary = any(name.startswith(("rope_", "rotary_", "partial_rotary")) for name in text.to_dict()) and not getattr(text, "alibi", False)
    if plan.calibrate and not rotary:
        raise TqaiError(
            f"{text.model_type} has no rotary positions, and the scaling of keys pools over rotary pairs: "
            "give Config(level='kv', calibrate=0), which stores keys as they are"
        )
