"""The half of the connector that moves, on caches that are plain tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from tqai_core.hosts.vllm.tiles import Tiles
from tqai_core.hosts.vllm.work import Place, Work
from tqai_core.hosts.vllm.worker import Mover
from tqai_core.kv.block import BlockCoder, BlockFormat
from tqai_core.kv.block_store import BlockStore
from tqai_core.kv.pool import Pool
from tqai_core.kv.shelf import Shelf

LAYERS, HEADS, TOKENS, DIM, BLOCKS = 2, 2, 64, 32, 6


@pytest.fixture
def mover(tmp_path):
    coder = BlockCoder(BlockFormat("m", "bfloat16", HEADS, TOKENS, DIM, (4,) * LAYERS, (4,) * LAYERS))
    count = 2 * HEADS * TOKENS * DIM
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    caches = [torch.randn(BLOCKS, HEADS, TOKENS, 2 * DIM, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(LAYERS)]
    pool = Pool(2, 8)
    yield Mover(caches, Shelf(coder, BlockStore(tmp_path, "f")), pool, lambda: Tiles(order, order.argsort()), 0), caches, pool
    pool.close()


def saves(names: dict[str, list[tuple[str, int]]], reads: dict[str, list[int]]) -> Work:
    return Work(saves={r: [Place(n, b, b == 0) for n, b in places] for r, places in names.items()}, reads=reads)


def test_blocks_come_back_before_the_step_or_between_steps(mover):
    mover, caches, pool = mover
    exact = [cache.clone() for cache in caches]
    mover.save(saves({"r": [("aa", 0), ("bb", 1)]}, {"r": [0, 1]}))
    pool.wait()
    mover.load(Work(loads={"s": [Place("aa", 4, True), Place("bb", 5)]}), wait=True)
    assert mover.take_loaded() == set()
    mover.take_loaded()
    mover.load(Work(loads={"t": [Place("aa", 2, True), Place("bb", 3)]}), wait=False)
    mover.take_loaded()
    pool.wait()
    assert mover.take_loaded() | {"t"} == {"t"}
    for old, new in zip(exact, caches, strict=True):
        for block, source in ((2, 0), (3, 1), (4, 0), (5, 1)):
            x, y = new[block].float(), old[source].float()
            assert ((x - y).square().sum() / y.square().sum()).item() < 0.011
    assert mover.take_bad() == set()


def test_the_end_of_a_load_in_the_background_is_told_once_whenever_it_comes(mover):
    mover, _, pool = mover
    for request in ("a", "b"):
        mover.load(Work(loads={request: [Place("cc", 1), Place("dd", 2)]}), wait=False)
        told = set()
        while not told:
            told |= mover.take_loaded()
        pool.wait()
        assert told | mover.take_loaded() == {request}
    assert mover.take_bad() == {1, 2}


def test_a_step_that_read_a_block_whose_load_failed_saves_nothing_and_others_do(mover):
    mover, _, pool = mover
    mover.load(Work(loads={"r": [Place("ee", 3)]}), wait=True)
    mover.save(saves({"r": [("0a", 1)], "shares": [("0b", 2)], "other": [("0c", 4)]}, {"r": [3, 1], "shares": [3, 2], "other": [4]}))
    pool.wait()
    shelf = mover._shelf
    assert [name for name in ("0a_0", "0b_0", "0c_0") if shelf.store.has(name)] == ["0c_0"]
    assert mover.take_bad() == {3}
    mover.save(saves({"r": [("0a", 1)]}, {"r": [3, 1]}))
    pool.wait()
    assert shelf.store.has("0a_0"), "computed again, it is kept"
