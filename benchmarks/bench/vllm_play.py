"""What happens to packed prefixes in a real engine, scene by scene; the bench and tests/vllm ask for its figures.

python -m bench.vllm_play SCENE MODEL FOLDER        in .venv-vllm, with ``benchmarks`` on the path; prints ``RESULT {json}``
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .vllm_engine import Answer, Engine, Judge, connector, say, tier

BITS = "k4.3v4"
BLOCK = 128


def ids_of(engine: Engine, name: str, count: int, start: int = 100) -> list[int]:
    from .vllm_texts import TEXTS

    return TEXTS[name].ids(engine.llm.get_tokenizer())[start : start + count]


def files(folder: Path) -> dict[str, bytes]:
    """Blocks of a store by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*_0")) if path.is_file()}


class Scene:
    """An engine with the connector; ``names`` are those of the blocks in the order in which they were saved first."""

    def __init__(self, model: str, folder: Path, bits: str = BITS, **sizes: Any) -> None:
        self.engine = Engine(model, connector(folder, bits=bits), **sizes)
        self.worker = self.engine.worker
        self.shelf = self.worker.shelf
        self.root, self.names = self.shelf.store.root, []
        claim = self.shelf.claim

        def seen(name: str) -> bool:
            ok = claim(name)
            if ok and name not in self.names:
                self.names.append(name)
            return ok

        self.shelf.claim = seen

    @property
    def planner(self) -> Any:
        return self.engine.core.scheduler.connector._planner

    def set_async(self, on: bool) -> None:
        self.worker._asynchronous = self.planner._asynchronous = on

    def put(self, content: dict[str, bytes]) -> None:
        """Make the store hold this and nothing else."""
        for name in files(self.root):
            self.shelf.store.drop(name)
        for name, data in content.items():
            self.shelf.store.put(name, data)

    @contextmanager
    def without_loads(self) -> Iterator[None]:
        """Every prompt is computed in full; what is not in the store yet is saved."""
        matched = self.planner.matched
        self.planner.matched = lambda request, computed: (matched(request, computed)[0] * 0, False)
        try:
            yield
        finally:
            self.planner.matched = matched

    @contextmanager
    def without_store(self) -> Iterator[None]:
        """vLLM alone: nothing is loaded or saved."""
        has, save = self.planner._has, self.worker._mover.save
        self.planner._has, self.worker._mover.save = lambda name: False, lambda work: None
        try:
            yield
        finally:
            self.planner._has, self.worker._mover.save = has, save


# -- damage


def flip(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        out = bytearray(data)
        out[int(at * (len(out) - 1))] ^= 4
        return bytes(out)

    return change


def kinds(other: bytes, foreign: bytes) -> dict[str, Callable[[bytes], bytes | None]]:
    """Ways in which a block may be wrong; None: it is gone between look-up and load."""
    return {
        "a bit of the payload": flip(0.6), "the last byte": flip(1.0), "a bit of the header": flip(0.0002),
        "the checksum": lambda d: d[:21] + bytes([d[21] ^ 1]) + d[22:], "cut in half": lambda d: d[: len(d) // 2], "empty": lambda d: b"",
        "longer": lambda d: d + b"x", "noise": lambda d: random.Random(0).randbytes(len(d)),
        "another version": lambda d: d[:4] + b"\x02" + d[5:], "another block": lambda d: other, "another format": lambda d: foreign,
        "thrown out": lambda d: None,
    }  # fmt: skip


def damage(model: str, folder: Path) -> dict[str, Any]:
    """Each kind of damage at the first block, two of them in the middle and loaded between steps too: hidden states, tokens and stored
    blocks beside those of a run that never had the block. The last two blocks are not stored: the step that fails has some to save."""
    from tqai_core.kv.block import BlockCoder

    scene = Scene(model, folder)
    ids, count = ids_of(scene.engine, "cryptography", 6 * BLOCK + 32), 6
    cold = scene.engine.ask(ids, count)
    scene.engine.drain()
    whole, order = files(scene.root), list(scene.names)
    packed = scene.engine.ask(ids, count)
    format = scene.shelf.coder.format
    kv = torch.randn(format.shape).bfloat16()
    foreign = BlockCoder(replace(format, seed=1)).encode(kv, order[0].encode(), False)
    rows = []
    for at in (0, 2):
        before = {name: whole[name] for name in order[:at]}
        scene.put(before)
        expected = scene.engine.ask(ids, count)
        scene.engine.drain()
        kept = files(scene.root)
        for load in ("sync", "async"):
            scene.set_async(load == "async")
            for kind, change in kinds(whole[order[3]], bytes(foreign)).items():
                if (load == "async" or at) and kind not in ("a bit of the payload", "thrown out"):
                    continue
                scene.put({name: kept[name] for name in order[:4]})
                rows.append(
                    {"kind": kind, "at": at, "load": load, **_one(scene, ids, count, order[at], change(kept[order[at]]), expected, kept)}
                )
    scene.set_async(False)
    return {"cold_cached": cold.cached, "packed_cached": packed.cached, "blocks": len(order), "rows": rows}


def _one(
    scene: Scene, ids: list[int], count: int, name: str, data: bytes | None, expected: Answer, kept: dict[str, bytes]
) -> dict[str, Any]:
    store = scene.shelf.store
    get = store.get
    if data is not None:
        store.put(name, data)
    refused = scene.shelf.counts["refused"] + scene.shelf.counts["missed"]
    if data is None:  # it is gone as soon as the load begins

        def gone(asked: str) -> Any:
            if asked == name:
                store.drop(name)
            return get(asked)

        store.get = gone
    try:
        found = scene.engine.ask(ids, count)
    finally:
        store.get = get
    scene.engine.drain()
    stored = files(scene.root)
    last = found.hidden[-len(expected.hidden) :]
    worst = max(
        (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
        for a, b in zip(expected.hidden, last, strict=True)
    )
    return {
        "noticed": scene.shelf.counts["refused"] + scene.shelf.counts["missed"] - refused, "largest_difference": worst,
        "wrong_tokens": sum(a != b for a, b in zip(expected.tokens, found.tokens, strict=True)),
        "failed_step_blocks": sum(stored.get(n) != kept[n] for n in kept),
    }  # fmt: skip


# -- chunks, preemption, eviction, another engine's folder


def small(model: str, folder: Path) -> dict[str, Any]:
    """A second engine on the folder of ``damage``, with little memory and prompts read in chunks."""
    scene = Scene(model, folder, kv_cache_memory_bytes=76 << 20, max_num_batched_tokens=512, max_model_len=2048)
    judge = Judge.of(model)
    shared = scene.engine.ask(ids_of(scene.engine, "cryptography", 6 * BLOCK + 32), 1)
    found: dict[str, Any] = {"shared_cached": shared.cached}
    ids = ids_of(scene.engine, "logits", 9 * BLOCK + 60)
    cold = scene.engine.ask(ids)
    scene.engine.drain()
    packed = scene.engine.ask(ids)
    found |= {
        "chunks": len(cold.hidden),
        "chunk_cached": packed.cached,
        "chunk_kl": judge.compare(cold.hidden[-1][-60:], packed.hidden[-1][-60:])["kl"],
    }
    found |= _preempted(scene) | _evicted(scene, judge)
    scene.engine.close()
    return found


def _preempted(scene: Scene) -> dict[str, Any]:
    """Four requests that do not fit together: how far the blocks that are saved lie from those of single runs."""
    scheduler, count = scene.engine.core.scheduler, [0]
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    prompts = [ids_of(scene.engine, name, 5 * BLOCK + 30, 900) for name in ("cryptography", "logits", "linear algebra", "progress bars")]
    scene.put({})
    scene.names.clear()
    answers = scene.engine.ask_all(prompts, 120)
    scene.engine.drain()
    scheduler._preempt_request = preempt
    together = files(scene.root)
    scene.put({})
    for prompt in prompts:
        scene.engine.ask(prompt, 1)
    scene.engine.drain()
    alone = files(scene.root)
    coder = scene.shelf.coder
    errors = []
    for name in alone:
        x, y = (torch.empty(coder.shape, dtype=coder.dtype) for _ in range(2))
        coder.decode(bytearray(alone[name]), name.encode(), x)
        if name in together:
            coder.decode(bytearray(together[name]), name.encode(), y)
            errors.append(((x.float() - y.float()).square().sum() / x.float().square().sum()).item())
    tokens = [len(answer.tokens) for answer in answers]
    return {
        "preempted": count[0],
        "preempted_tokens": tokens,
        "preempted_blocks": len(errors),
        "alone_blocks": len(alone),
        "preempted_nmse": max(errors),
    }


def _evicted(scene: Scene, judge: Judge) -> dict[str, Any]:
    """Blocks vanish and break while they are loaded: closeness to the exact runs. Then a store that is too small for what is saved."""
    prompts = [ids_of(scene.engine, name, 6 * BLOCK + 20, 300) for name in ("logits", "linear algebra")]
    with scene.without_store():
        exact = [scene.engine.ask(prompt).hidden[-1][-20:] for prompt in prompts]
    for prompt in prompts:
        scene.engine.ask(prompt)
    scene.engine.drain()
    store, random_, before = scene.shelf.store, random.Random(0), dict(scene.shelf.counts)
    get = store.get

    def doomed(name: str) -> Any:
        """One block in five is thrown out or damaged just before it is read."""
        path = store.path(name)
        if random_.random() < 0.2 and path.exists():
            if random_.random() < 0.5:
                path.unlink()
            else:
                data = bytearray(path.read_bytes())
                data[random_.randrange(len(data))] ^= 1
                path.write_bytes(data)
        return get(name)

    store.get, worst, rounds, cached = doomed, 0.0, 6, 0
    for _ in range(rounds):
        for prompt, hidden in zip(prompts, exact, strict=True):
            answer = scene.engine.ask(prompt)
            cached += answer.cached
            worst = max(worst, judge.compare(hidden, answer.hidden[-1][-20:])["kl"])
            scene.engine.drain()
    store.get = get
    lost = sum(scene.shelf.counts[name] - before.get(name, 0) for name in ("refused", "missed"))
    store.limit = 10 * scene.shelf.coder.size(True)
    bound = []
    for start in range(0, 1200, 300):
        scene.engine.ask(ids_of(scene.engine, "progress bars", 6 * BLOCK + 20, start))
        scene.engine.drain()
        bound.append(store.nbytes / store.limit)
    return {
        "evicted_asks": 2 * rounds,
        "evicted_lost": lost,
        "evicted_cached": cached,
        "evicted_kl": worst,
        "bound": max(bound),
        "thrown_out": store.evicted,
    }


# -- below vLLM's own offloading


def below(model: str, folder: Path) -> dict[str, Any]:
    """The tier: a prompt comes back from it, exact or packed, and a damaged chunk is computed again."""
    engine, judge = Engine(model, tier(folder, bits=BITS), max_num_batched_tokens=2048), Judge.of(model)
    manager, root = engine.core.scheduler.connector.connector_scheduler.manager, engine.tiers[0]._shelf.store.root
    stats: Counter[str] = Counter()
    take = engine.tiers[0].get_stats

    def kept() -> Any:
        found = take()
        stats.update({} if found is None else found.reduce())
        return found

    engine.tiers[0].get_stats = kept  # what vLLM's metrics are told
    ids = ids_of(engine, "logits", 8 * BLOCK + 60)
    cold = engine.ask(ids)
    engine.drain()
    saved = len(files(root))
    manager.reset_cache()
    packed = engine.ask(ids)
    kl = judge.compare(cold.hidden[0][-60:], packed.hidden[-1][-60:])["kl"]
    first = {path.name: path for path in root.rglob("*_0")}
    for path in first.values():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    engine.drain()
    manager.reset_cache()
    again = engine.ask(ids)
    engine.drain()
    same = torch.equal(cold.hidden[0], again.hidden[-1]) if cold.hidden[0].shape == again.hidden[-1].shape else False
    manager.reset_cache()
    healed = engine.ask(ids)
    engine.ask([7] * 40)
    engine.close()
    return {
        "saved": saved, "cached": packed.cached, "kl": kl, "damaged_cached": again.cached, "damaged_equal": same,
        "healed_cached": healed.cached, "metrics": stats,
    }  # fmt: skip


SCENES = {"damage": damage, "small": small, "below": below}

if __name__ == "__main__":
    began = time.process_time()
    found = SCENES[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    say(found | {"cpu_seconds": time.process_time() - began})
