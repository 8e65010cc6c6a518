"""The tier with vLLM's own job and configuration classes, without an engine: ranks, groups, damage, a full queue, several engines."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob

import tqai_core.hosts.vllm as host
from tqai_core.errors import TqaiError

LAYERS, HEADS, TOKENS, DIM, CHUNKS = 3, 2, 64, 32, 8


def config(ranks: int = 1, groups: int = 1, blocks: int = 1, layout: str = "LBHNC") -> OffloadingConfig:
    names = tuple(f"layer.{i}" for i in range(LAYERS))
    parallel = OffloadingParallelConfig(
        rank=0, world_size=ranks, tp_size=ranks, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0, data_parallel_size=1,
        data_parallel_rank_local=None, is_parallelism_agnostic=True,
    )  # fmt: skip
    return OffloadingConfig(
        groups=tuple(OffloadingGroupConfig(TOKENS // blocks, names, i) for i in range(groups)),
        worker_kv_bytes_per_block=2 * LAYERS * HEADS * TOKENS // blocks * DIM * 2, enable_kv_cache_events=False, extra_config={},
        engine_id="e",
        model=OffloadingModelConfig("no such model", "bfloat16"), cache=OffloadingCacheConfig(TOKENS // blocks, blocks), parallel=parallel,
        kv_cache_layout=layout,
    )  # fmt: skip


class Engine:
    """A tier over host memory of its own."""

    def __init__(self, path, made: OffloadingConfig | None = None, **options) -> None:
        made = made or config()
        size = made.worker_kv_bytes_per_block * made.cache.blocks_per_chunk * made.parallel.world_size
        row = -(-size // 4096) * 4096
        self.memory = torch.zeros(CHUNKS, row, dtype=torch.int8)
        numbers = torch.randn(CHUNKS, size // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.memory[:, :size] = numbers.view(torch.int8)
        self.size, self.view = size, memoryview(self.memory.numpy())
        options = {"heads": HEADS, "dim": DIM, **options}
        self.tier = host.TqaiTier(SimpleNamespace(config=made), self.view, "TqaiTier", None, path=str(path), **options)
        self.context, self.jobs = ReqContext("r"), 0

    def keys(self, count: int = CHUNKS, group: int = 0):
        found = [make_offload_key(bytes([i]) * 32, group) for i in range(count)]
        for i, key in enumerate(found):
            self.context.set_offload_key_position(key, (i + 1) * TOKENS)
        return found

    def submit(self, keys, load: bool = False):
        self.jobs += 1
        job = TransferJob(self.jobs, keys, np.arange(len(keys), dtype=np.int32), load, self.context)
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        self.tier.drain_jobs()
        return {result.job_id: result for result in self.tier.get_finished_jobs()}[self.jobs]

    def lookup(self, key) -> LookupResult:
        end = time.monotonic() + 10
        while (found := self.tier.lookup(key, self.context)) is LookupResult.RETRY and time.monotonic() < end:
            self.tier.on_schedule_end(ScheduleEndContext((), ()))
            time.sleep(0.01)
        return found

    def numbers(self) -> torch.Tensor:
        return self.memory[:, : self.size].clone().view(torch.bfloat16).float()

    def files(self):
        return sorted(path for path in self.tier._shelf.store.root.rglob("*") if path.is_file())

    def close(self) -> None:
        self.tier.shutdown()
        self.view.release()  # as vLLM does: fails while anybody holds it


def nmse(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).square().sum() / y.square().sum()).item()


@pytest.mark.parametrize(
    "made", [config(), config(ranks=2), config(blocks=2), config(layout="LBNHC"), config(layout="BLHNC", blocks=2)],
    ids=["one rank", "two ranks", "two blocks a chunk", "NHC", "blocks first"],
)  # fmt: skip
def test_chunks_come_back_in_another_engine_with_the_error_of_their_bits(tmp_path, made):
    first = Engine(tmp_path, made, bits="k4v4")
    exact, keys = first.numbers(), first.keys()
    assert first.lookup(keys[0]) is LookupResult.MISS
    assert first.submit(keys).success
    assert len(first.files()) == CHUNKS
    first.close()
    second = Engine(tmp_path, made, bits="k4v4")
    second.memory.zero_()
    assert second.lookup(second.keys()[3]) is LookupResult.HIT
    assert second.submit(keys, load=True).success
    assert 0.002 < nmse(second.numbers(), exact) < 0.011
    second.close()


def test_the_ranks_do_not_change_what_a_head_becomes(tmp_path):
    """The same numbers in one rank of four heads and in two of two."""
    engine = Engine(tmp_path / "two", config(ranks=2), bits="k4v4")
    keys = engine.keys()
    engine.submit(keys)
    exact = engine.numbers().view(CHUNKS, 2, LAYERS, HEADS, TOKENS, 2, DIM)
    engine.submit(keys, load=True)
    two = engine.numbers().view_as(exact)
    engine.close()
    single = replace(config(), worker_kv_bytes_per_block=2 * config().worker_kv_bytes_per_block)
    engine = Engine(tmp_path / "one", single, bits="k4v4", heads=2 * HEADS)
    engine.memory[:, : engine.size] = exact.transpose(1, 2).flatten(2, 3).bfloat16().flatten(1).view(torch.int8)
    keys = engine.keys()
    engine.submit(keys)
    engine.submit(keys, load=True)
    one = engine.numbers().view(CHUNKS, LAYERS, 2 * HEADS, TOKENS, 2, DIM).unflatten(2, (2, HEADS)).transpose(1, 2)
    engine.close()
    assert torch.equal(one, two)


def test_several_groups_are_stored_as_they_are(tmp_path):
    engine = Engine(tmp_path, config(groups=2))
    exact = engine.numbers()
    engine.submit(engine.keys(4, 0))
    engine.submit(engine.keys(4, 1))
    assert len(engine.files()) == 8, "a name has the number of its group"
    engine.memory.zero_()
    engine.submit(engine.keys(4, 1), load=True)
    assert torch.equal(engine.numbers()[:4], exact[:4])
    engine.close()


def test_what_is_damaged_or_gone_fails_alone_and_is_a_miss_from_then_on(tmp_path):
    engine = Engine(tmp_path)
    keys = engine.keys()
    engine.submit(keys)
    assert all(engine.lookup(key) is LookupResult.HIT for key in keys)
    files = engine.files()
    data = bytearray(files[2].read_bytes())
    data[-1] ^= 1
    files[2].write_bytes(data)
    files[5].unlink()
    result = engine.submit(keys, load=True)
    assert not result.success
    assert set(result.successful_keys) == {key for i, key in enumerate(keys) if i not in (2, 5)}
    assert [engine.lookup(keys[i]) for i in (2, 5, 1)] == [LookupResult.MISS, LookupResult.MISS, LookupResult.HIT]
    assert engine.submit(keys).success
    assert len(engine.files()) == CHUNKS, "stored again"
    stats = engine.tier.get_stats().reduce()
    assert (stats["vllm:tqai_tier_refused"], stats["vllm:tqai_tier_missed"]) == (1, 1)
    assert stats["vllm:tqai_tier_saved"] == CHUNKS + 2
    assert engine.tier.get_stats() is None
    engine.close()


def test_a_full_queue_drops_stores_and_never_loads(tmp_path):
    engine = Engine(tmp_path, queue=4)
    keys = engine.keys()
    assert engine.submit(keys[:4]).success
    result = engine.submit(keys)
    assert not result.success
    assert engine.tier.get_stats().reduce()["vllm:tqai_tier_dropped"] == CHUNKS
    assert len(engine.submit(keys, load=True).successful_keys) == 4
    engine.close()


@pytest.mark.parametrize(
    ("made", "options", "word"),
    [
        (config(), {"heads": 0}, "give the tier's options 'heads'"), (config(), {"heads": 3}, "bytes a block, vLLM has"),
        (config(), {"bit": "k4v4"}, "did you mean 'bits'"),
        (replace(config(), groups=(OffloadingGroupConfig(32, ("a",), 0),)), {}, "bytes a block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_engine_is_told_at_start(tmp_path, made, options, word):
    with pytest.raises(TqaiError, match=word):
        Engine(tmp_path, made, **options)
