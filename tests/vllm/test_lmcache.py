"""LMCache's serde over the same blocks."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from tqai_core.errors import TqaiError
from tqai_core.kv.envelope import Miss

lmcache = pytest.importorskip("tqai_core.hosts.lmcache")
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.serde.base import SerdeConfig  # noqa: E402
from lmcache.v1.distributed.serde.factory import create_serde_processor  # noqa: E402

SHAPE = (2, 3, 256, 128)  # keys and values, layers, tokens, 2 heads of 64


def keys(n: int) -> list[ObjectKey]:
    return [ObjectKey(bytes([i]) * 32, "model", 0) for i in range(n)]


def memory(tensor: torch.Tensor) -> SimpleNamespace:
    """What LMCache's memory objects have that a serde looks at."""
    return SimpleNamespace(tensor=tensor, set_used_size=lambda n: None, get_size=lambda: tensor.nbytes)


def done(query, task) -> bool:
    end = time.monotonic() + 30
    while (found := query(task)) is None and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found)


def test_chunks_go_through_the_processor_that_lmcache_makes():
    made = create_serde_processor(SerdeConfig("tqai", {"dim": 64, "bits": "k4v4"}))
    layout = MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[torch.bfloat16])
    room = made.estimate_serialized_size(layout)
    chunks = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    assert 3.4 < chunks[0].nbytes / room < 4
    packed, out = [torch.zeros(room + 100, dtype=torch.uint8) for _ in chunks], [torch.zeros_like(x) for x in chunks]
    names = keys(3)
    task = made.submit_serialize([*map(memory, chunks)], [*map(memory, packed)], names)
    assert done(made.query_serialize_result, task)
    task = made.submit_deserialize([*map(memory, packed)], [*map(memory, out)], names)
    assert done(made.query_deserialize_result, task)
    for x, y in zip(chunks, out, strict=True):
        assert ((x.float() - y.float()).square().sum() / x.float().square().sum()).item() < 0.011
        assert torch.equal(x[:, :, :4], y[:, :, :4])
    packed[1][room // 2] ^= 1
    task = made.submit_deserialize([memory(packed[1])], [memory(out[1])], names[1:2])
    assert not done(made.query_deserialize_result, task)
    task = made.submit_deserialize([memory(packed[2])], [memory(out[2])], names[:1])
    assert not done(made.query_deserialize_result, task), "a block of another object"
    made.close()


def test_a_refused_chunk_leaves_the_memory_alone_and_bad_options_are_told():
    chunks = lmcache.Chunks(lmcache.Options.read({"path": "x", "dim": 64}))
    x = torch.randn(SHAPE).bfloat16()
    data = torch.zeros(chunks.coder(SHAPE, x.dtype).size(True), dtype=torch.uint8)
    lmcache.TqaiSerializer(chunks).serialize(memory(x), memory(data), keys(1)[0])
    data[-1] ^= 1
    out = torch.full_like(x, 7)
    with pytest.raises(Miss, match="damaged"):
        lmcache.TqaiDeserializer(chunks).deserialize(memory(data), memory(out), keys(1)[0])
    assert bool((out == 7).all())
    with pytest.raises(TqaiError, match="'dim' is missing"):
        lmcache.factory({})
    with pytest.raises(TqaiError, match="no keys and values"):
        chunks.coder((1, 3, 256, 128), torch.bfloat16)
