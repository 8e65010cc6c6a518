"""One sampling whose caches are packed: what is held, how well, and what the page and the report show of it. Knows no host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tqai_core.kv.activations import Activations
from tqai_core.kv.prefix import Prefix
from tqai_core.kv.segments import Plan
from tqai_core.report import Report

Packed = Activations | Prefix
NONE = (
    "this model keeps nothing from step to step. TQAI Cache packs what another node keeps: put Flux KV Cache (FLUX.2 Klein with reference "
    "pictures), WanAnimate2Cache or QwenImage21Cache beside it, before or after; a ComfyUI that is too old has none of them"
)


@dataclass(frozen=True)
class CacheSettings:
    """What a patched model carries. ``budget`` is in bytes, ``host``: packed rows lie in host memory, ``node`` the node's id."""

    bits_k: int
    bits_v: int
    host: bool = False
    budget: int | None = None
    node: str | None = None

    def plan(self, sink: int = 0) -> Plan:
        return Plan(self.bits_k, self.bits_v, sink, recent=0)


class Store(Protocol):
    """Where the packed layers of one cache lie."""

    def layers(self) -> Iterator[tuple[str, Packed]]:
        """Name and rows of everything that is held; a name comes once for each sequence or condition."""

    def offload(self) -> None:
        """Move packed rows to host memory."""

    def stop(self) -> None:
        """Free what the forward under way does not need: nothing more is kept."""

    def drop(self) -> None:
        """Free everything."""


class CacheRun:
    """What one sampling holds, and its report.

    Attributes:
        host: packed rows go to host memory.
        full: the budget is used up: nothing more is kept, so the host computes at each step what it would have read.
    """

    def __init__(self, settings: CacheSettings, total: int, send: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.settings, self.total, self.send = settings, total, send
        self.report, self.host, self.full = Report(), settings.host, False
        self.lock = threading.RLock()
        self.stores: list[Any] = []
        self._held = self._new = 0  # bytes at the last walk, and of what was kept since
        self._began, self._inside = time.process_time(), False

    @property
    def held(self) -> int:
        return sum(part.nbytes for store in self.stores for _, part in store.layers())

    def kept(self, part: Packed) -> None:
        """A layer was packed, or left as it is. The budget holds at once, the report's rows are made when the step ends."""
        self._new += part.nbytes
        if part.why:
            self.fallback(f"{part.why}: kept as they are")
        budget = self.settings.budget
        if budget is not None and not self.full and self._held + self._new > budget and (held := self.held) > budget:
            self._shrink(f"{held / 2**20:.1f} MB held, over the budget of {budget / 2**20:g} MB", part.device)

    def _shrink(self, what: str, device: torch.device) -> None:
        """Keep the promise of the budget: host memory first, then nothing at all."""
        if not self.host and device.type != "cpu":
            self.host = True
            for store in self.stores:
                store.offload()
            self.fallback(f"{what}: kept in CPU memory")
            return
        self.full = True
        self._rows()
        for store in self.stores:
            store.stop()
        self.fallback(f"{what}: nothing is kept from here on, each step computes it again")

    def fallback(self, why: str) -> None:
        self.report.fall_back("cache", why)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around one call of the sampler for a prediction."""
        if self._inside:  # a guider that asks another one: still the same evaluation
            yield
            return
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        with self.lock:
            self.report.evaluations += 1
            if self._new:
                self._rows()
            if self.full:
                self._drop()
        self._send()

    def _rows(self) -> None:
        """What is held, layer by layer. The run's only host syncs are here, after the steps that kept something."""
        rows: dict[str, dict[str, Any]] = {}
        self._held = self._new = exact = 0
        for name, part in [found for store in self.stores for found in store.layers()]:
            row = rows.setdefault(name, {"tokens": 0, "bytes_held": 0, "bytes_exact": 0, "bits_k": None, "nmse_k": None, "nmse_v": None})
            pair = isinstance(part, Prefix)
            row |= {"bits_v": self.settings.bits_v} | ({"bits_k": self.settings.bits_k} if pair else {})
            names = ("nmse_k", "nmse_v") if pair else ("nmse_v",)
            found = {} if part.error is None else dict(zip(names, part.error.view(-1).tolist(), strict=True))
            row |= {key: max(row[key] or 0.0, error) for key, error in found.items()}
            row["tokens"] += part.tier.length if isinstance(part, Prefix) else part.tokens
            row["bytes_held"] += part.nbytes
            row["bytes_exact"] += 2 * part.numbers
            row["bits_held"] = round(16 * row["bytes_held"] / row["bytes_exact"], 4)
            self._held, exact = self._held + part.nbytes, exact + 2 * part.numbers
        self.report.per_site = rows or self.report.per_site
        self.report.bytes_held_peak = max(self.report.bytes_held_peak, self._held)
        self.report.bytes_exact = max(self.report.bytes_exact, exact)

    def _drop(self) -> None:
        for store in self.stores:
            store.drop()
        self._held = self._new = 0

    def close(self, failed: bool) -> dict[str, Any]:
        """The report; nothing stays held. Interrupted and failed runs end here too."""
        if self._new:
            self._rows()
        self._drop()
        if not self.report.per_site and not self.report.fallbacks and not failed:
            self.fallback(NONE)
        self.report.seconds_cpu = time.process_time() - self._began
        self._send()
        return self.report.to_dict()

    def state(self) -> dict[str, Any]:
        """What the live panel shows."""
        rows, report = self.report.per_site.values(), self.report
        worst = {name: report.worst(name) for name in ("nmse_k", "nmse_v")}
        return {
            "cache": True, "state": "packed" if rows and not self.full else "idle", "step": report.evaluations, "total": self.total,
            "why": report.fallbacks[-1]["why"] if report.fallbacks else "", "layers": len(rows), "bytes": self._held,
            "peak": report.bytes_held_peak, "exact": report.bytes_exact, **worst,
        }  # fmt: skip

    def _send(self) -> None:
        if self.send is not None:
            self.send(self.state())
