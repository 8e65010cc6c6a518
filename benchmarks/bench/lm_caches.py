"""Other KV caches of transformers, for the bench: each behind one call, each holding what it really stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from tqai_core.codecs import packing


def _affine(x: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Groups along the last dimension -> packed codes, scale, offset (16-bit)."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-9).bfloat16()
    low = low.bfloat16()
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return packing.pack(codes.view(-1, x.shape[-1]), bits), scale, low


def _plain(held: tuple[Tensor, ...], bits: int, size: int) -> Tensor:
    codes, scale, low = held
    return packing.unpack(codes, size, bits).view(*scale.shape[:-1], size) * scale.float() + low.float()


class KiviLayer(DynamicLayer):
    """KIVI 2402.02750: keys in groups of 32 tokens a channel, values in groups of 64 channels a token, the last 32 exact.
    ``sink``: so many first tokens exact as well, which is ours and not KIVI's."""

    def __init__(self, bits: int, sink: int = 0) -> None:
        super().__init__()
        self.bits, self.sink = bits, sink
        self.first: tuple[Tensor, Tensor] | None = None
        self.held: list[tuple[Any, Any]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.first is None:
            self.first = key_states[:, :, : self.sink].clone(), value_states[:, :, : self.sink].clone()
            key_states, value_states = key_states[:, :, self.sink :], value_states[:, :, self.sink :]
        self.keys: Tensor = torch.cat([self.keys, key_states], 2) if self.keys.numel() else key_states
        self.values: Tensor = torch.cat([self.values, value_states], 2) if self.values.numel() else value_states
        first_k, first_v = (x.float() for x in self.first)
        k = torch.cat([first_k] + [_plain(k, self.bits, 32).transpose(2, 3) for k, _ in self.held] + [self.keys.float()], 2).to(self.dtype)
        v = torch.cat([first_v] + [_plain(v, self.bits, 64).flatten(3) for _, v in self.held] + [self.values.float()], 2).to(self.dtype)
        while self.keys.shape[2] >= 64:
            group = self.keys[:, :, :32].float().transpose(2, 3).contiguous()
            value = self.values[:, :, :32].float().unflatten(3, (-1, 64)).contiguous()
            self.held.append((_affine(group, self.bits), _affine(value, self.bits)))
            self.keys, self.values = self.keys[:, :, 32:].clone(), self.values[:, :, 32:].clone()
        return k, v

    def get_seq_length(self) -> int:
        first = 0 if self.first is None else self.first[0].shape[2]
        return first + 32 * len(self.held) + (self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0)


class UpstreamLayer(DynamicLayer):
    """tqai 0.6 of the package index: its PolarQuantizer on every token as it comes."""

    def __init__(self, bits_k: int, bits_v: int) -> None:
        super().__init__()
        self.bits = (bits_k, bits_v)
        self.held: list[tuple[Any, Any]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        from tqai.quantizer import PolarQuantizer

        super().lazy_initialization(key_states, value_states)
        self._coders = [PolarQuantizer(head_dim=x.shape[-1], bits=b) for x, b in zip((key_states, value_states), self.bits, strict=True)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = (key_states, value_states)
        out = [torch.cat([self._coders[i].dequantize(*held[i]).to(self.dtype) for held in self.held] + [now[i]], 2) for i in (0, 1)]
        self.held.append((self._coders[0].quantize(key_states), self._coders[1].quantize(value_states)))
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return sum(held[0][0].shape[2] for held in self.held)


Maker = Callable[[], Cache]


def caches(config: Any, bits: int) -> tuple[dict[str, Maker], dict[str, str]]:
    """Name -> maker of the caches that can run here at ``bits`` of 2 or 4, and why the others cannot."""
    layers = config.num_hidden_layers

    def quantized(kind: str, axis: int) -> Maker:
        return lambda: QuantizedCache(kind, config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=32)

    wanted: dict[str, Maker] = {
        "quanto": quantized("quanto", 0),
        "hqq": quantized("hqq", 1),
        "KIVI-like": lambda: Cache(layers=[KiviLayer(bits) for _ in range(layers)]),
        "KIVI-like, 4 sinks": lambda: Cache(layers=[KiviLayer(bits, sink=4) for _ in range(layers)]),
        "tqai 0.6 (upstream)": lambda: Cache(layers=[UpstreamLayer(bits, bits) for _ in range(layers)]),
    }
    found: dict[str, Maker] = {}
    missing: dict[str, str] = {}
    for name, make in wanted.items():
        try:
            cache = make()
            for _ in range(2):
                cache.update(torch.randn(1, 2, 80, 64), torch.randn(1, 2, 80, 64), 0)
            found[name] = make
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def exact(config: Any) -> Cache:
    return DynamicCache(config=config)
