"""A KV connector for vLLM's CPU engines: full blocks of prompts go packed to a store, and later requests, of any engine, load them.

Written for vLLM 0.32. GPU engines have vLLM's own offloading, and :class:`tier.TqaiTier` below it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

from ...errors import TqaiError
from ...kv.block import BlockCoder
from ...kv.block_store import BlockStore
from ...kv.pool import Pool
from ...kv.shelf import Shelf
from .identity import model_name
from .options import Options
from .scheduler import Planner
from .tiles import Tiles
from .work import Work
from .worker import Mover

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.tqai")
LOADS = ("sync", "async")


class TqaiConnector(KVConnectorBase_V1):
    """Options: :class:`options.Options`, and ``load``: ``"sync"`` loads before a step, ``"async"`` between steps."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra: Mapping[str, Any] = self._kv_transfer_config.kv_connector_extra_config
        given, load = Options.read(extra, ignored=("load",)), extra.get("load", "sync")
        if load not in LOADS:
            raise TqaiError(f"option 'load' is {load!r}: give one of {', '.join(LOADS)}")
        refuse(vllm_config, kv_cache_config, self._kv_transfer_config.kv_load_failure_policy)
        self._names = list(kv_cache_config.kv_cache_groups[0].layer_names)
        self._coder = coder_of(vllm_config, kv_cache_config, given)
        store = BlockStore(given.path, self._coder.envelope.name, given.limit_bytes)
        self._asynchronous = load == "async"
        self.shelf = Shelf(self._coder, store)
        if role == KVConnectorRole.SCHEDULER:
            ranks = range(vllm_config.parallel_config.tensor_parallel_size)
            has = lambda name: all(store.has(f"{name}_{rank}") for rank in ranks)  # noqa: E731
            self._planner = Planner(vllm_config.cache_config.block_size, has, self._asynchronous)
        else:
            self._pool = Pool(given.threads, given.queue, "tqai-kv")
            logger.info("tqai: blocks are packed (%s) in %s", given.bits, store.root)

    # -- scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return self._planner.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._planner.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Work:
        return self._planner.step(scheduler_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._planner.finished(request)
        return False, None  # what is saved was copied before the step ended

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is lost is a later miss

    # -- worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        caches = [kv_caches[name] for name in self._names]
        layer = self._vllm_config.compilation_config.static_forward_context[self._names[0]]

        def probe() -> Tiles:
            import torch

            slots = torch.arange(self._coder.format.tokens)
            write = lambda k, v, block: layer.impl.do_kv_cache_update(layer, k, v, block, slots)  # noqa: E731
            _, _, *shape = self._coder.shape
            return Tiles.ask(write, caches[0][:1].clone(), (shape[0], shape[1], shape[2]))

        self._mover = Mover(caches, self.shelf, self._pool, probe, get_tensor_model_parallel_rank())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._mover.load(self._work(), wait=not self._asynchronous)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # loaded before the step

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return  # a block is saved whole, after the step

    def wait_for_save(self) -> None:
        self._mover.save(self._work())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._mover.take_loaded() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._mover.take_bad()

    def drain(self) -> None:
        """Wait until all that was to be saved is saved."""
        self._pool.wait()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._pool.close()
            logger.info("tqai: %s", dict(self.shelf.counts))

    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work


def refuse(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, policy: str) -> None:
    """TqaiError for an engine whose cache cannot be packed, by name, before it starts."""
    device = vllm_config.device_config.device_type
    if device != "cpu":
        raise TqaiError(f"TqaiConnector is for CPU engines, this one is on {device}: use OffloadingConnector with the tier TqaiTier")
    if policy != "recompute":
        raise TqaiError(f"kv_load_failure_policy is {policy!r}, so that a lost block would fail its request: give 'recompute'")
    parallel = vllm_config.parallel_config
    if parallel.world_size != parallel.tensor_parallel_size:
        raise TqaiError("TqaiConnector knows tensor parallel ranks alone: run without pipeline and context parallel ones")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise TqaiError(f"the model has {len(groups)} groups of caches ({kinds}): TqaiConnector packs one, TqaiTier stores all as they are")
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec) or isinstance(spec, MLAAttentionSpec):
        raise TqaiError(f"the cache is of {type(spec).__name__}: only full attention with keys and values is packed")


def coder_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, given: Options) -> BlockCoder:
    """The coder of this worker's blocks; of all ranks alike, but for the calibrated scales, which rule several ranks out."""
    group, model = kv_cache_config.kv_cache_groups[0], vllm_config.model_config
    spec, ranks = group.kv_cache_spec, vllm_config.parallel_config.tensor_parallel_size
    assert isinstance(spec, FullAttentionSpec)
    if given.calibration and ranks > 1:
        raise TqaiError("scales of a calibration with several ranks: only TqaiTier knows which heads a rank has")
    ident = f"{model_name(model.model, model.revision)} tp{ranks}"
    dtype = str(spec.dtype).removeprefix("torch.")
    return given.coder(ident, dtype, len(group.layer_names), spec.num_kv_heads, spec.block_size, spec.head_size)
