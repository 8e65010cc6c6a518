"""What the caches of ``tqai bench dit_kv`` cost: bytes, memory and time of a step, on diffusers' FLUX.2 class with random weights.

Two heads of 128 (or four of 64), the attention of Klein-KV. Times are CPU time of one cached step.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tqai_core as tqai

from .harness import Row

TEXT, SIDE, REFERENCE = 16, 32, 64  # SIDE, REFERENCE: of the picture and of the reference in tokens
CODECS = {"tqai k8v4": "turbo:bits_k=8,bits_v=4", "tqai k4v4": "turbo:bits_k=4,bits_v=4", "tqai 4": "turbo"}
ROUNDS = 7


class Model:
    """A transformer, its inputs, and the first and later steps of a pipeline that keeps the reference's keys and values."""

    def __init__(self, reference: int = REFERENCE, dim: int = 128) -> None:
        from diffusers import Flux2Transformer2DModel
        from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

        torch.manual_seed(0)
        self.net = Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=dim, num_attention_heads=256 // dim,
            joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(dim // 4,) * 4, guidance_embeds=False,
        ).eval().requires_grad_(False)  # fmt: skip
        for block in self.net.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in self.net.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        self.noise, self.picture = torch.randn(1, SIDE**2, 16), torch.randn(1, reference**2, 16)
        ids = [_grid(0, TEXT, 1), _grid(10, reference, reference), _grid(0, SIDE, SIDE)]
        self.given = dict(encoder_hidden_states=torch.randn(1, TEXT, 32), txt_ids=ids[0], return_dict=False)
        self.ids = ids[2], torch.cat(ids[1:])

    @torch.no_grad()
    def begin(self) -> tuple[Tensor, Any]:
        """The velocity of the first step, and the cache."""
        x, count = torch.cat([self.picture, self.noise], 1), self.picture.shape[1]
        return self.net(x, timestep=torch.ones(1), img_ids=self.ids[1], kv_cache_mode="extract", num_ref_tokens=count, **self.given)

    @torch.no_grad()
    def step(self, cache: Any) -> Tensor:
        given = dict(timestep=torch.full((1,), 0.5), img_ids=self.ids[0], kv_cache=cache, kv_cache_mode="cached")
        return self.net(self.noise, **given, **self.given)[0]


def _grid(frame: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(*(torch.tensor(x).float() for x in ([frame], range(height), range(width), [0])))


def layers(cache: Any) -> list[Any]:
    return [*cache.double_block_caches, *cache.single_block_caches]


@contextmanager
def packed(codec: str, **options: Any) -> Iterator[tuple[Model, Any, Any]]:
    """A model after its first step, its packed cache, and the handle."""
    model = Model(**options)
    with tqai.apply(model.net, tqai.Config(level="kv", codec=codec, sink=0)) as handle:
        yield model, model.begin()[1], handle


def smaller() -> list[Row]:
    """How much smaller than bf16 a cache is held, everything counted."""
    rows = []
    for dim in (64, 128):
        for name in ("tqai k4v4", "tqai 4"):
            with packed(CODECS[name], reference=32, dim=dim) as (_, _, handle):
                report = handle.report()
                rows.append({"method": name, "dim": dim, "tokens": 32**2, "ratio": report.bytes_exact / report.bytes_held_peak})
    return rows


def speed() -> list[Row]:
    """CPU time of a cached step beside that of the dense cache, in turns; packed rows read in place, or a layer decoded at a time."""
    plain = Model()
    dense, rows = plain.begin()[1], []
    for name, codec in CODECS.items():
        for way in ("in place", "decoded"):
            with packed(codec) as (model, cache, handle):
                for layer in layers(cache):
                    layer.slots.in_place = layer.slots.in_place if way == "in place" else lambda: False
                times: dict[str, list[float]] = {"dense": [], "packed": []}
                for _ in range(ROUNDS):
                    for side, net, held in (("packed", model, cache), ("dense", plain, dense)):
                        start = time.process_time()
                        net.step(held)
                        times[side].append(time.process_time() - start)
                assert handle.report().per_site["attn.0"]["materialised"] == (0 if way == "in place" else ROUNDS)
            ratio = median(times["packed"]) / median(times["dense"])
            rows.append({"method": name, "way": way, "tokens": REFERENCE**2, "ratio": ratio})
    return rows


class Live(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        storages = lambda tree: [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]  # noqa: E731
        given, out = {x.data_ptr() for x in storages((args, kwargs))}, func(*args, **(kwargs or {}))
        for storage in storages(out):
            place = storage.data_ptr()
            if place not in given and place not in self.sizes:
                self.sizes[place] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, place)
        return out

    def _gone(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


def memory() -> list[Row]:
    """What a step needs beside what is held, more than the same step without a reference: MiB, and layers of dense keys and values."""
    rows = []
    for name, codec in CODECS.items():
        for way in ("in place", "decoded"):
            with packed(codec) as (model, cache, _):
                for layer in layers(cache):
                    layer.slots.in_place = layer.slots.in_place if way == "in place" else lambda: False
                with Live() as with_it:
                    model.step(cache)
                own = sum(2 * x.numel() * x.element_size() for x in layers(cache)[0].get()) / 2
                for layer in layers(cache):
                    layer.clear()
                    layer.plain.store(layer, *(torch.zeros(1, 0, 2, 128) for _ in "kv"))
                with Live() as without:
                    model.step(cache)
            more = with_it.peak - without.peak
            rows.append({"method": name, "way": way, "tokens": REFERENCE**2, "mib": more / 2**20, "layers": more / own})
    return rows
