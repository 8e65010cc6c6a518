"""The tier below vLLM's own offloading: chunks go from host memory to a store of packed blocks and back. Written for vLLM 0.32.

vLLM copies between devices and host memory, pins, and keeps the most recently used chunks there. This class lives in the scheduler's
process and must never hold it up: look-ups run in vLLM's own look-up thread, packing and unpacking in a pool. What cannot be stored
soon is not stored. Models with several groups of caches (sliding windows, linear attention), and layouts that are no rows of keys and
values, are stored as they are; the log says why.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ...errors import TqaiError
from ...kv.block import DTYPES, BlockCoder, RawCoder
from ...kv.block_store import BlockStore
from ...kv.pool import Pool
from ...kv.shelf import Shelf
from .identity import model_name
from .options import Options
from .pages import Pages

logger = logging.getLogger("vllm.tqai")
COUNTERS = {
    "saved": "Blocks packed and stored.", "saved_bytes": "Bytes of the blocks stored.", "save_failures": "Blocks that could not be stored.",
    "loaded": "Blocks read and unpacked.", "loaded_bytes": "Bytes of the blocks read.", "missed": "Blocks that another writer threw out "
    "between look-up and load.", "refused": "Blocks that were damaged, foreign or of another version.", "dropped": "Blocks that were not "
    "stored because too many waited.", "evicted": "Blocks that this engine threw out of the store.",
    "encode_seconds": "CPU time of packing.", "decode_seconds": "CPU time of unpacking.",
}  # fmt: skip


def block_name(key: OffloadKey) -> str:
    return f"{get_offload_block_hash(key).hex()}_{get_offload_group_idx(key)}"


class LookUp(AsyncLookupManager):
    """Asks the store in a thread of its own."""

    def __init__(self, tier_type: str, store: BlockStore) -> None:
        super().__init__(tier_type)
        self._store = store

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return [self._store.has(block_name(key)) for key in keys]


class Transfer:
    """One job of vLLM's: a task for each of its chunks, in any order."""

    def __init__(self, job: TransferJob, bytes_each: int) -> None:
        self.id, self.keys = job.job_id, list(job.keys)
        self.chunks = [int(chunk) for chunk in job.chunk_ids]
        self._each, self._left, self._start = bytes_each, len(self.keys), time.perf_counter()
        self._done: list[OffloadKey] = []
        self._lock = threading.Lock()
        self.failed: list[OffloadKey] = []

    def finish(self, key: OffloadKey, ok: bool) -> JobResult | None:
        """The result, once no chunk is left."""
        with self._lock:
            (self._done if ok else self.failed).append(key)
            self._left -= 1
            if self._left:
                return None
        return self.result()

    def result(self) -> JobResult:
        done = tuple(self._done)
        ok = len(done) == len(self.keys)
        spent, moved = time.perf_counter() - self._start, len(done) * self._each
        return JobResult(self.id, ok, None if ok else done or None, transfer_time=spent, transfer_bytes=moved)


class TqaiTier(SecondaryTierManager):
    """Options: :class:`options.Options`."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        given = Options.read(options, ignored=("locality",))
        config = offloading_spec.config
        self._pages, coder = coder_of(config, given, self.block_size_bytes)
        self._shelf = Shelf(coder, BlockStore(given.path, coder.envelope.name, given.limit_bytes))
        self._memory: Tensor | None = torch.from_numpy(np.asarray(primary_kv_view)).view(torch.uint8)
        self._pool = Pool(given.threads, given.queue, "tqai-tier")
        self._lookups = LookUp(tier_type, self._shelf.store)
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._loads: dict[int, Transfer] = {}
        self._evicted = 0
        kind = "as they are" if self._pages is None else f"packed ({given.bits})"
        logger.info("tqai: chunks of %s bytes are stored %s in %s", f"{self.block_size_bytes:,}", kind, self._shelf.store.root)

    # -- what vLLM asks, in the scheduler's thread

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        transfer, context = Transfer(job_metadata, self.block_size_bytes), job_metadata.req_context
        tasks = []
        for key, chunk in zip(transfer.keys, transfer.chunks, strict=True):
            end = context.get_offload_key_position(key)
            first = self._pages is not None and end is not None and end <= self._pages.blocks * self._pages.tokens
            tasks.append(partial(self._run, transfer, key, partial(self._store, block_name(key), chunk, first)))
        if not self._pool.submit(tasks):
            self._shelf.count(dropped=len(tasks))
            self._finished.put(transfer.result())

    def submit_load(self, job_metadata: TransferJob) -> None:
        transfer = self._loads[job_metadata.job_id] = Transfer(job_metadata, self.block_size_bytes)
        pairs = zip(transfer.keys, transfer.chunks, strict=True)
        tasks = [partial(self._run, transfer, key, partial(self._load, block_name(key), chunk)) for key, chunk in pairs]
        if not self._pool.submit(tasks, urgent=True):
            transfer.failed = transfer.keys
            self._finished.put(transfer.result())

    def get_finished_jobs(self) -> Collection[JobResult]:
        found = []
        while not self._finished.empty():
            result = self._finished.get()
            load = self._loads.pop(result.job_id, None)
            if load is not None and load.failed:
                self._lookups.mark_miss(load.failed)
            found.append(result)
        return found

    def has_pending_work(self) -> bool:
        return not self._pool.idle or not self._finished.empty()

    def drain_jobs(self) -> None:
        self._pool.wait()

    def shutdown(self) -> None:
        self._lookups.shutdown()
        self._pool.close()
        self._memory = None  # vLLM gives the memory back now

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingCounterMetadata]:
        return {metric(name): OffloadingCounterMetadata(documentation=text) for name, text in COUNTERS.items()}

    def get_stats(self) -> OffloadingConnectorStats | None:
        found, evicted = self._shelf.take_counts(), self._shelf.store.evicted
        if evicted != self._evicted:
            found["evicted"], self._evicted = evicted - self._evicted, evicted
        if not found:
            return None
        stats = OffloadingConnectorStats()
        for name, value in found.items():
            stats.increase_counter(metric(name), value)
        return stats

    # -- in the pool

    def _run(self, transfer: Transfer, key: OffloadKey, work: Any) -> None:
        try:
            ok = work()
        except Exception:  # a thread that ended would leave its job, and the memory pinned for it, open for ever
            logger.exception("tqai: a block could not be moved")
            ok = False
        result = transfer.finish(key, ok)
        if result is not None:
            self._finished.put(result)

    def _store(self, name: str, chunk: int, first: bool) -> bool:
        return not self._shelf.claim(name) or self._shelf.save(name, self._view(chunk), first)

    def _load(self, name: str, chunk: int) -> bool:
        why = self._shelf.load(name, self._view(chunk))
        if why:
            logger.warning("tqai: block %s is computed again: %s", name[:16], why)
        return not why

    def _view(self, chunk: int) -> Tensor:
        assert self._memory is not None
        return self._memory[chunk] if self._pages is None else self._pages.view(self._memory[chunk])


def metric(name: str) -> str:
    return f"vllm:tqai_tier_{name}"


def coder_of(config: OffloadingConfig, given: Options, chunk_bytes: int) -> tuple[Pages | None, BlockCoder | RawCoder]:
    """How chunks lie and are packed; without pages they are stored as they are. TqaiError for options that do not fit the engine."""
    model = given.model or model_name(config.model.name)
    parallel, group, dtype = config.parallel, config.groups[0], config.model.dtype
    ident = f"{model} tp{parallel.tp_size} {config.kv_cache_layout}"
    why = ""
    if len(config.groups) > 1:
        why = f"the model has {len(config.groups)} groups of caches"
    elif dtype not in DTYPES:
        why = f"the cache is in {dtype}"
    elif parallel.world_size != parallel.tp_size or config.replicated_layout or config.canonical_layout:
        why = "ranks do not split it by heads alone"
    pages = None
    if not why:
        heads, dim = heads_of(config, given)
        pages = Pages(
            config.kv_cache_layout or "", parallel.tp_size, len(group.layer_names), config.cache.blocks_per_chunk, heads,
            group.tokens_per_block, dim, DTYPES[dtype],
        )  # fmt: skip
        why = pages.unsupported()
        per_block = pages.nbytes // pages.blocks // pages.ranks
        if not why and per_block != config.worker_kv_bytes_per_block:
            raise TqaiError(
                f"{pages.layers} layers of {heads} key heads of {dim} make {per_block:,} bytes a block, vLLM has "
                f"{config.worker_kv_bytes_per_block:,}: give the tier's options 'heads' (of one rank) and 'dim'"
            )
    if why or pages is None:
        logger.warning("tqai: blocks are stored as they are, not packed: %s", why)
        return None, RawCoder(f"{ident} g{len(config.groups)} b{config.cache.blocks_per_chunk}", dtype, chunk_bytes, given.secret())
    tokens = pages.blocks * pages.tokens
    if tokens < 64:
        raise TqaiError(f"chunks of {tokens} tokens asked, packing pays from 64 on: give 'block_size': 128 beside 'spec_name'")
    return pages, given.coder(ident, dtype, pages.layers, pages.heads, tokens, pages.dim, pages.ranks)


def heads_of(config: OffloadingConfig, given: Options) -> tuple[int, int]:
    """Key heads of a rank and head dimension, which vLLM does not tell a tier: from the options, else the model's configuration."""
    if given.heads and given.dim:
        return given.heads, given.dim
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(config.model.name, local_files_only=True).get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except (OSError, ValueError, AttributeError) as error:
        told = f"the configuration of {config.model.name!r} does not tell its key heads ({str(error)[:80]})"
        raise TqaiError(f"{told}: give the tier's options 'heads' (of one rank) and 'dim'") from None
    return given.heads or max(heads // config.parallel.tp_size, 1), given.dim or dim
