"""vLLM's offloading where the engine itself runs on a CPU, which vLLM refuses: host memory to host memory, so that tiers can be tested
without a GPU. ``"spec_name": "HostSpec", "spec_module_path": "bench.vllm_host"``. Blocks lie in the shared region as plain rows."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tqai_core.hosts.vllm.tiles import Tiles


class HostWorker(OffloadingWorker):
    """Copies blocks of the engine's cache into the region and back, tiles on one side and rows on the other."""

    def __init__(self, kv_caches: CanonicalKVCaches, per: int, region: SharedOffloadRegion, tiles: Tiles) -> None:
        self.per, self.region, self.tiles = per, region, tiles
        self.engine: list[Tensor] = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self.host = [region.create_next_worker_view(t.page_size_bytes * per) for t in kv_caches.tensors]
        self.done: list[TransferResult] = []

    def _copy(self, job_id: int, engine: Any, host: Any, out: bool) -> bool:
        start, began = engine.block_indices[0] % self.per, time.perf_counter()
        pairs = [(int(b), int(host.chunk_ids[(start + i) // self.per]), (start + i) % self.per) for i, b in enumerate(engine.block_ids)]
        for own, there in zip(self.engine, self.host, strict=True):
            page = own.shape[1]
            for block, chunk, at in pairs:
                rows, memory = there[chunk, at * page : (at + 1) * page].view(torch.bfloat16), own[block].view(torch.bfloat16)
                if out:
                    torch.index_select(memory, 0, self.tiles.logical, out=rows)
                else:
                    torch.index_select(rows, 0, self.tiles.physical, out=memory)
        moved = len(pairs) * sum(x.shape[1] for x in self.engine)
        self.done.append(TransferResult(job_id, True, moved, time.perf_counter() - began))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, False)

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        return

    def shutdown(self) -> None:
        self.engine = self.host = []
        self.region.cleanup()


def interleaved(tiles: Tiles, heads: int, tokens: int, dim: int) -> Tiles:
    """The same for rows ``[H, N, K|V]``, which is how a GPU's cache lies, in place of ``[2, H, N, D]``."""
    order = torch.arange(2 * heads * tokens * dim).view(2, heads, tokens, dim).permute(1, 2, 0, 3).flatten()
    logical = tiles.logical[order]
    return Tiles(logical.argsort(), logical)


def tiles_of(heads: int, tokens: int, dim: int) -> Tiles:
    """Asked of the backend's kernel: a worker of offloading has no layers to ask."""
    isa = _get_attn_isa(torch.bfloat16, tokens, dim, "auto")

    def write(k: Tensor, v: Tensor, block: Tensor) -> None:
        parts = block.view(1, heads, tokens * 2, dim).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, *parts, torch.arange(tokens), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    return Tiles.ask(write, torch.zeros(1, heads, tokens, 2 * dim, dtype=torch.bfloat16), (heads, tokens, dim))


class HostSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            from transformers import AutoConfig

            config, group = AutoConfig.from_pretrained(self.config.model.name, local_files_only=True), self.config.groups[0]
            heads, tokens = config.num_key_value_heads, group.tokens_per_block
            dim = config.hidden_size // config.num_attention_heads
            rank = self.config.parallel.rank
            region = SharedOffloadRegion(self._engine_id, self.num_chunks, rank, self.kv_bytes_per_chunk, self.cpu_page_size_per_worker)
            tiles = interleaved(tiles_of(heads, tokens, dim), heads, tokens, dim)
            self._worker = HostWorker(kv_caches, self.blocks_per_chunk, region, tiles)
        return self._worker
