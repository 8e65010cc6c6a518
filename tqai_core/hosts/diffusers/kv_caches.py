"""Level kv for diffusion transformers: the caches of references, prefixes and earlier frames that a pipeline makes, packed.

Hooks of torch on the transformer see each call. Where it is given a cache, its layers become packed ones (:mod:`layer_caches`), once.
They are apart from what the other levels set, so both can be applied to one pipeline, in either order.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...config import STAGES_KV, Config
from ...errors import TqaiError
from ...handle import Handle
from ...kv.inputs import Inputs, bits_for
from ...kv.prefix import energy
from ...kv.segments import Plan
from ...registry import build
from ...report import Report
from ..language import layer_plans
from .clock import denoisers
from .layer_caches import Appended, Packed, Slots, Whole, Window, adopt
from .projections import Projection, Rotary
from .release import on_failure, running_bar

MOST_AS_INPUTS = 4  # bits up to which keys and values that have no bits of their own are held as inputs
READS = (None, "cached", "inject", "read", "skip")  # modes of a call that stores nothing


@dataclass(frozen=True)
class Kind:
    """A transformer whose attentions keep keys and values.

    Attributes:
        layer: the class of its layer caches, in the module of the transformer.
        stand_in: what a packed one does in its place.
        attentions: names of the lists of blocks, in the order of the layers, and of the attention in a block.
        interleaved: whether rotary positions turn channels (2i, 2i + 1), where the attention does not say it.
        argument: the argument of a block that has the layer cache, where the transformer makes the cache in its own forward.
        processor: a part of the name of the attention processors that use the cache, where others do not.
        rotary: the argument of an attention that has the rotary positions, where keys and values can be projected again.
        pipeline: an example of a pipeline that makes the cache.
    """

    layer: str
    stand_in: type[Packed]
    attentions: tuple[tuple[str, str], ...]
    pipeline: str
    interleaved: bool = True
    argument: str = ""
    processor: str = ""
    rotary: str = ""

    def modules(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        """Each block with its attention."""
        return [(block, getattr(block, name)) for blocks, name in self.attentions for block in getattr(model, blocks)]


KINDS = {
    "QwenImage21Transformer2DModel": Kind(
        "QwenImage21KVLayerCache", Whole, (("transformer_blocks", "attn"),), "QwenImage21Pipeline",
        rotary="rotary_emb",
    ),
    "Flux2Transformer2DModel": Kind(
        "Flux2KVLayerCache", Whole, (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")), "Flux2KleinKVPipeline",
        argument="joint_attention_kwargs", processor="KV", rotary="image_rotary_emb",
    ),
    "WanAnimate2Transformer3DModel": Kind("WanAnimate2KVLayerCache", Whole, (("blocks", "self_attn"),), "WanAnimate2ModularPipeline"),
    "GlmImageTransformer2DModel": Kind(
        "GlmImageLayerKVCache", Appended, (("transformer_blocks", "attn1"),), "GlmImagePipeline", interleaved=False
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Kind(
        "SanaWMRefinerKVLayerCache", Window, (("transformer_blocks", "attn1"),), "SanaWMLTX2Refiner"
    ),
}  # fmt: skip


class CachesHandle(Handle):
    """A pipeline whose caches are packed. The caches are the pipeline's: they live and end with its own variables."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.exact: list[dict[str, str]] = []  # layers that are never packed, and why
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._report, self._guarded = Report(warnings=["nothing has run yet"], fallbacks=self.exact), True
        self._began = time.process_time()

    @property
    def nbytes(self) -> int:
        """Bytes held by all living caches."""
        return sum(slots.nbytes for slots in self._slots())

    def begin(self) -> None:
        """A pipeline has made a cache. A generation begins where no other one holds anything."""
        if not any(slots.runs for slots in self._slots()):
            self._report, self._began, self._guarded = Report(fallbacks=list(self.exact)), time.process_time(), False

    def row(self, site: str, plan: Plan) -> dict[str, Any]:
        """The report's row of a new cache of a layer."""
        names = (f"{site}/{i}" if i else site for i in range(len(self._report.per_site) + 1))
        row = {
            "bits_k": plan.bits_k, "bits_v": plan.bits_v, "tokens": 0, "tokens_packed": 0, "bytes_held": 0, "bits_held": 0.0,
            "nmse_k": None, "nmse_v": None, "materialised": 0,
        }  # fmt: skip
        return self._report.per_site.setdefault(next(name for name in names if name not in self._report.per_site), row)

    def keep(self, layer: Any) -> None:
        self._layers.add(layer)

    def call(self) -> None:
        """A call of the transformer that was given a cache. What a broken loop leaves of caches is freed at once."""
        if not self._guarded and (bar := running_bar()) is not None:
            self._guarded = True
            on_failure(self._drop, bar)
        self._report.evaluations, self._report.warnings = self._report.evaluations + 1, []
        self._report.seconds_cpu = time.process_time() - self._began

    def changed(self, slots: Slots) -> None:
        """After every store: bytes are walked, not computed."""
        report, prefixes = self._report, slots.prefixes()
        living = list(self._slots())
        report.bytes_held_peak = max(report.bytes_held_peak, sum(other.held for other in living))
        report.bytes_exact = max(report.bytes_exact, sum(2 * run.numbers for other in living for run in other.prefixes()))
        if not prefixes:
            return
        tokens, numbers = sum(run.length for run in prefixes), sum(run.numbers for run in prefixes)
        slots.row |= {
            "tokens": tokens, "tokens_packed": sum(run.packed for run in prefixes), "bytes_held": slots.held,
            "bits_held": round(8 * slots.held / max(numbers, 1), 4),
        }  # fmt: skip
        if inputs := {run.coder.bits for run in prefixes if isinstance(run, Inputs)}:
            slots.row["bits_inputs"] = max(inputs)
        if slots.error is not None:
            slots.row |= {"nmse_k": slots.error[0], "nmse_v": slots.error[1]}
        for run in prefixes:
            if run.why:
                self.fall_back("cache", run.why)

    def fall_back(self, where: str, why: str) -> None:
        self._report.fall_back(where, why)

    def report(self) -> Report:
        """The generation under way, or the last one. ``nmse_k``, ``nmse_v``: the error of what was packed, at the worst store."""
        for row in self._report.per_site.values():
            row |= {name: float(x) for name, x in row.items() if isinstance(x, Tensor)}
        return self._report

    def remove(self) -> None:
        super().remove()
        for layer in list(self._layers):
            layer.unpack()
        self._layers.clear()

    def _drop(self) -> None:
        for layer in list(self._layers):
            layer.clear()

    def _slots(self) -> Iterator[Slots]:
        return (layer.slots for layer in list(self._layers))


@dataclass
class Watch:
    """The hooks of one transformer: they find the caches of its calls, and see the queries and the inputs while keys are stored."""

    model: Any
    kind: Kind
    layer_class: type
    plans: list[Plan | str]
    attentions: list[Any]
    handle: CachesHandle
    bits: int  # of a number of keys and values, where inputs may be held instead of them; 0: they are not
    in_place: bool = False  # whether attentions of this call may read packed rows where they lie: compiled ones cannot
    stores: bool = False  # whether this call stores keys
    energies: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, dict[str, Any]] = field(default_factory=dict)  # to the attentions of this call, until their keys are stored
    positions: tuple[Any, int, Rotary] | None = None  # of this call: as they are given, the first stored one, and as they are held

    def before_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        containers = [x for x in (*args, *kwargs.values()) if hasattr(x, "__dict__") and not isinstance(x, (Tensor, nn.Module))]
        layers = [layers for x in containers if (layers := self._layers_of(x))]
        mode = kwargs.get("kv_cache_mode", getattr(layers[0][0], "mode", None) if layers else None)
        self.stores = mode not in READS
        self.after_call()
        self.in_place = bool(self.kind.rotary) and not any(module._compiled_call_impl for module in model.modules())
        new = [i for found in layers for i, layer in enumerate(found) if not isinstance(layer, Packed) and isinstance(self.plans[i], Plan)]
        if new or (self.kind.argument and self.stores):
            self.handle.begin()
        for found in layers:
            for number, layer in enumerate(found):
                self.adopt(number, layer)
        if layers or mode is not None:
            self.handle.call()

    def after_call(self, *_: Any) -> None:
        """Nothing that is seen in a call outlives it."""
        self.energies.clear()
        self.given.clear()
        self.positions = None

    def _layers_of(self, container: Any) -> list[Any]:
        lists = [part for part in vars(container).values() if isinstance(part, list)]
        return [layer for part in lists for layer in part if isinstance(layer, self.layer_class)]

    def adopt(self, number: int, layer: Any) -> None:
        """Make a layer cache a packed one, where it is none and its layer is to be packed."""
        plan = self.plans[number]
        if isinstance(layer, Packed) or isinstance(plan, str):
            return
        attention = self.attentions[number]
        rope = getattr(attention, "rope_type", None)
        interleaved = self.kind.interleaved if rope is None else rope == "interleaved"
        slots = Slots(
            plan, attention.heads, interleaved, self.handle.config.offload, lambda: self.energies.pop(number, None),
            self.handle.changed, self.handle.row(f"attn.{number}", plan), lambda k, v: self.inputs(number, k, v),
            lambda: self.in_place,
        )  # fmt: skip
        adopt(layer, self.kind.stand_in, slots)
        self.handle.keep(layer)
        self.handle.changed(slots)

    def inputs(self, number: int, k: Tensor, v: Tensor) -> Inputs | None:
        """The inputs of a layer, of which keys and values are stored, packed; None where these are to be packed themselves."""
        given, plan = self.given.pop(number, None), self.plans[number]
        if given is None or not isinstance(plan, Plan) or k.shape[1] < max(plan.calibrate, 1) or k.ndim != 4:
            return None
        x, first = given["hidden_states"], given.get("num_txt_tokens", 0)
        bits = bits_for(x.shape[2], sum(part.shape[2] * part.shape[3] for part in (k, v)), self.bits)
        if not bits or given.get(self.kind.rotary) is None:
            return None
        rotary, count, new = self._rotary(given[self.kind.rotary], x.shape[1], first, k.shape[1])
        found = Inputs.pack(
            k, v, x[:, first : first + count], 8 if plan.bits_k == 8 else bits, Projection(self.attentions[number], rotary),
            rotary.tensors if new else [], plan.seed, self.handle.config.offload,
        )  # fmt: skip
        if found is None:
            self.handle.fall_back(f"attn.{number}", "its keys and values are no projections of its inputs that tqai knows: rows are held")
        return found

    def _rotary(self, angles: Any, tokens: int, first: int, count: int) -> tuple[Rotary, int, bool]:
        """Rotary positions of the stored tokens, made once a call; ``tokens`` are the last ones that ``angles`` are for."""
        first += len(angles if isinstance(angles, Tensor) else angles[0]) - tokens
        if self.positions is not None and self.positions[0] is angles and self.positions[1] == first:
            return self.positions[2], count, False
        pairs = [size // 2 for size in self.model.config.axes_dims_rope]
        self.positions = angles, first, Rotary.of(angles, first, count, pairs)
        return self.positions[2], count, True

    def before_attention(self, number: int) -> Callable[..., None]:
        @torch.compiler.disable
        def see(kwargs: dict[str, Any]) -> None:
            self.given[number] = kwargs

        def hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.stores and not args:
                see(kwargs)

        return hook

    def before_block(self, number: int) -> Callable[..., None]:
        """For transformers that make the cache in their own forward: each layer is packed as it is filled."""

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = (kwargs.get(self.kind.argument) or {}).get("kv_cache")
            if isinstance(layer, self.layer_class):
                self.adopt(number, layer)

        return hook

    def after_queries(self, number: int) -> Callable[..., None]:
        heads = self.attentions[number].heads

        @torch.compiler.disable
        def see(q: Tensor) -> None:
            self.energies[number] = energy(q, heads)

        def hook(norm: nn.Module, args: Any, q: Tensor) -> None:
            if self.stores:
                see(q)

        return hook


def attach(target: Any, config: Config) -> CachesHandle:
    """Pack the caches of a pipeline or of a bare transformer. Nothing is changed when this raises."""
    if extra := [role for role in ("scorer", "strategy", "monitor") if getattr(config, role) is not None]:
        raise TqaiError(f"{', '.join(extra)} asked for the caches of a diffusion transformer, which take a codec alone: leave it out")
    if ":file=" in config.codec or ",file=" in config.codec:
        raise TqaiError(f"codec {config.codec!r}: a calibration file is for the caches of language models; give bits_k and bits_v")
    models = {"transformer": target} if isinstance(target, nn.Module) else denoisers(target)
    handle = CachesHandle(config)
    checked = [(model, found) for model in models.values() if (found := _watch(model, config, handle)) is not None]
    if not checked:
        known = ", ".join(kind.pipeline for kind in KINDS.values())
        raise TqaiError(
            f"{type(target).__name__} keeps no keys and values from step to step, so level 'kv' has nothing to pack: it is for {known} and "
            "their transformers, and for language models; level 'model' takes any pipeline"
        )
    for model, watch in checked:
        _hook(model, watch)
    return handle


def _watch(model: Any, config: Config, handle: CachesHandle) -> Watch | None:
    """What is to be hooked; None for a model that has no cache, TqaiError for one that cannot be hooked."""
    known = ((cls, kind) for cls in type(model).__mro__ if (kind := KINDS.get(cls.__name__)))
    cls, kind = next(known, (None, None))
    if hasattr(model, "_orig_mod"):
        raise TqaiError(
            "this transformer is compiled as a whole, so its calls cannot be seen: call tqai.apply first, then compile its blocks "
            "(transformer.compile_repeated_blocks())"
        )
    layer_class = None if cls is None or kind is None else getattr(sys.modules[cls.__module__], kind.layer, None)
    if kind is None or layer_class is None:
        return None
    if any(isinstance(getattr(hook, "__self__", None), Watch) for hook in model._forward_pre_hooks.values()):
        raise TqaiError("tqai is already applied to the caches of this transformer: call handle.remove() first")
    attentions = [attention for _, attention in kind.modules(model)]
    if kind.processor and not any(kind.processor in type(attention.processor).__name__ for attention in attentions):
        return None
    plans = layer_plans(config, [""] * len(attentions))
    handle.exact += [{"where": f"attn.{i}", "why": plan} for i, plan in enumerate(plans) if isinstance(plan, str)]
    codec: Any = build("codec", config.codec)
    bits = 0 if codec.name == "exact" or codec.bits_k or codec.bits_v or codec.bits > MOST_AS_INPUTS else codec.bits
    bits = MOST_AS_INPUTS if config.codec == STAGES_KV["codec"] else bits  # what nobody chose
    return Watch(model, kind, layer_class, plans, attentions, handle, bits)


def _hook(model: nn.Module, watch: Watch) -> None:
    hooks = [
        model.register_forward_pre_hook(watch.before_call, with_kwargs=True),
        model.register_forward_hook(watch.after_call, always_call=True),
    ]
    for number, (block, attention) in enumerate(watch.kind.modules(model)):
        if isinstance(watch.plans[number], str):
            continue
        if watch.kind.argument:
            hooks.append(block.register_forward_pre_hook(watch.before_block(number), with_kwargs=True))
        if watch.kind.rotary and watch.bits:
            hooks.append(attention.register_forward_pre_hook(watch.before_attention(number), with_kwargs=True))
        if getattr(attention, "norm_q", None) is not None:
            hooks.append(attention.norm_q.register_forward_hook(watch.after_queries(number)))
    for hook in hooks:
        watch.handle.on_remove(hook.remove)
