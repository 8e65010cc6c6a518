"""LMCache: the serde ``tqai`` packs its chunks as blocks (:mod:`kv.block`). Written for LMCache 0.5.

LMCache finds no serdes by itself: import this module where its server starts. Then ``"serde": {"type": "tqai", "dim": 128}`` stands
beside an adapter; ``dim`` is the head dimension. LMCache keeps a buffer of one size for all chunks, and does not say which of them
begins a sequence, so each has its first tokens exact.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.distributed.serde.factory import get_registered_serde_types, register_serde_factory
from lmcache.v1.memory_management import MemoryObj
from torch import Tensor

from ..errors import TqaiError
from ..kv.block import BlockCoder
from ..kv.envelope import Envelope
from .vllm.options import Options

NAME = "tqai"


class Chunks:
    """Coders of LMCache's chunks ``[2, layers, tokens, heads x dim]``, one for each shape that comes."""

    def __init__(self, given: Options) -> None:
        if not given.dim:
            raise TqaiError("serde tqai: option 'dim' is missing: give the head dimension of the model, as in \"dim\": 128")
        self._given = given
        self._coder = lru_cache(maxsize=16)(self._made)

    def coder(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> BlockCoder:
        return self._coder(tuple(map(int, shape)), str(dtype).removeprefix("torch."))

    def _made(self, shape: tuple[int, ...], dtype: str) -> BlockCoder:
        dim = self._given.dim
        if len(shape) != 4 or shape[0] != 2 or shape[3] % dim:
            raise TqaiError(f"serde tqai: chunks of shape {list(shape)} are no keys and values [2, layers, tokens, heads x {dim}]")
        return self._given.coder(self._given.model or "lmcache", dtype, shape[1], shape[3] // dim, shape[2], dim)

    def rows(self, x: Tensor) -> Tensor:
        """A chunk as ``[2, L, H, N, D]``, without a copy."""
        return x.unflatten(3, (-1, self._given.dim)).transpose(2, 3)


def block_key(key: ObjectKey | None) -> bytes:
    """What an object is stored under, so that a block of another object is noticed."""
    return b"" if key is None else hashlib.sha256(repr(key).encode()).digest()


class TqaiSerializer(Serializer):
    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        x = tensor_of(src)
        data = self._chunks.coder(x.shape, x.dtype).encode(self._chunks.rows(x), block_key(key), True)
        tensor_of(dst).flatten().view(torch.uint8)[: len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))
        return len(data)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        if len(layout_desc.shapes) != 1:
            raise TqaiError(f"serde tqai: {len(layout_desc.shapes)} tensors a chunk, one of keys and values is packed")
        return self._chunks.coder(layout_desc.shapes[0], layout_desc.dtypes[0]).size(True)


class TqaiDeserializer(Deserializer):
    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Raises for bytes that are not this object's block: LMCache counts it as a failed load."""
        x, packed = tensor_of(dst), tensor_of(src).flatten().view(torch.uint8)
        data = bytearray(packed.cpu().numpy().tobytes())
        data = data[: Envelope.length(data) or len(data)]
        self._chunks.coder(x.shape, x.dtype).decode(data, block_key(key), self._chunks.rows(x))


def tensor_of(memory: MemoryObj) -> Tensor:
    if memory.tensor is None or not prod(memory.tensor.shape):
        raise TqaiError("serde tqai: the memory object has no tensor")
    return memory.tensor


def factory(kwargs: dict[str, Any]) -> SerdeProcessor:
    """Options: those of :class:`vllm.options.Options` but ``path`` and ``limit_bytes``, which LMCache has of its own."""
    given = Options.read({**kwargs, "path": "lmcache"}, ignored=("max_workers",))
    chunks = Chunks(given)
    return AsyncSerdeProcessor(TqaiSerializer(chunks), TqaiDeserializer(chunks), max_workers=given.threads)


if NAME not in get_registered_serde_types():
    register_serde_factory(NAME, factory)
