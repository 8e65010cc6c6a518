"""The half of the connector that decides: which blocks of a prompt are in the store, and which are full and to be saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .work import Place, Work

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class Progress:
    """A request: blocks of its prompt that are saved or need not be, and its blocks in the cache."""

    request: Request
    saved: int = 0
    blocks: list[int] = field(default_factory=list)


class Planner:
    """``tokens`` a block; ``has(name)`` asks the store for the block of every rank."""

    def __init__(self, tokens: int, has: Callable[[str], bool], asynchronous: bool) -> None:
        self._tokens, self._has, self._asynchronous = tokens, has, asynchronous
        self._requests: dict[str, Progress] = {}
        self._local: dict[str, int] = {}  # blocks that vLLM itself had when it last asked
        self._work = Work()

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """Tokens after the ``computed`` ones that can be loaded, in whole blocks; at least one token of a prompt is left to compute."""
        start = self._local[request.request_id] = computed // self._tokens
        end = min((request.num_tokens - 1) // self._tokens, len(request.block_hashes))
        hit = start
        while hit < end and self._has(_name(request, hit)):
            hit += 1
        return (hit - start) * self._tokens, self._asynchronous and hit > start

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """The request has its blocks; the first ``tokens`` after the local ones are to be loaded."""
        progress = self._requests.setdefault(request.request_id, Progress(request))
        if tokens:
            ids, start = blocks.get_block_ids()[0], self._local[request.request_id]
            numbers = range(start, start + tokens // self._tokens)
            self._work.loads[request.request_id] = [Place(_name(request, i), ids[i], i == 0) for i in numbers]
            progress.saved = numbers.stop

    def step(self, out: SchedulerOutput) -> Work:
        """The work of the step that ``out`` describes."""
        work, self._work = self._work, Work()
        for new in out.scheduled_new_reqs:
            if (progress := self._requests.get(new.req_id)) is not None:
                progress.blocks = list(new.block_ids[0])
                self._due(progress, new.num_computed_tokens, out.num_scheduled_tokens[new.req_id], work)
        cached = out.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            if (progress := self._requests.get(name)) is not None:
                if name in cached.resumed_req_ids:
                    progress.blocks = []
                progress.blocks += (cached.new_block_ids[i] or ([],))[0]
                self._due(progress, cached.num_computed_tokens[i], out.num_scheduled_tokens[name], work)
        return work

    def _due(self, progress: Progress, computed: int, scheduled: int, work: Work) -> None:
        """Blocks of the prompt that are full after this step. A request that goes back, since a load failed or it was preempted, saves
        what it computes again."""
        request = progress.request
        tokens = min(computed + scheduled, request.num_prompt_tokens)
        full = min(tokens // self._tokens, len(request.block_hashes), len(progress.blocks))
        start = min(progress.saved, computed // self._tokens)
        places = [Place(_name(request, i), progress.blocks[i], i == 0) for i in range(start, full) if not self._has(_name(request, i))]
        progress.saved = max(start, full)
        if places:
            work.saves[request.request_id] = places
            work.reads[request.request_id] = progress.blocks[: -(-(computed + scheduled) // self._tokens)]

    def finished(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)
        self._local.pop(request.request_id, None)


def _name(request: Request, number: int) -> str:
    return bytes(request.block_hashes[number]).hex()
