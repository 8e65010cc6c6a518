"""What the scheduler's half of the connector tells the worker's half, each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(frozen=True)
class Place:
    """A block: its name in the store, its number in the cache, and whether it is the first of its sequence."""

    name: str
    block: int
    first: bool = False


@dataclass
class Work(KVConnectorMetadata):
    """By request. ``reads``: all blocks that the request's step reads or writes, where it has something to save."""

    loads: dict[str, list[Place]] = field(default_factory=dict)
    saves: dict[str, list[Place]] = field(default_factory=dict)
    reads: dict[str, list[int]] = field(default_factory=dict)
