"""How close, how small and how fast restored prefixes are, measured in an engine: the children of ``tqai bench vllm``.

python -m bench.vllm_figures quality|plain|speed|tiers MODEL FOLDER
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from .vllm_engine import Engine, Judge, say, tier
from .vllm_play import BITS, BLOCK, Scene, files
from .vllm_texts import TEXTS

PREFIXES, NEXT = (1024, 2048, 3968), 127
# label -> bits of keys and values, and what is left out
CODES = {
    "exact": "exact", "k8v8": "k8v8", "k5.2v4": "k5.2v4", BITS: BITS, "k4v4": "k4v4", "k3v3": "k3v3", "k2v2": "k2v2",
    "k5.4v4, no mean, no sinks": "k5.4v4", "k4.5v4, no mean, no sinks": "k4.5v4",
}  # fmt: skip


PLAIN = {"plain k4.27v4": (4.27, 4), "plain k5.17v4": (5.17, 4)}


def prompts(engine: Engine) -> list[tuple[str, int, list[int]]]:
    """(text, prefix, tokens): one window a text and length, at different places."""
    tokenizer = engine.llm.get_tokenizer()
    out = []
    for name, text in TEXTS.items():
        ids = text.ids(tokenizer)
        out += [(name, p, ids[100 + p % 1000 : 100 + p % 1000 + p + NEXT]) for p in PREFIXES]
    return out


@dataclass(frozen=True)
class Rows:
    """The plain code, as the serde of tqai 0.6 had it: rows with a gain of 16 bits by least squares, nothing exact, no mean, a fraction of
    a bit spread evenly over the layers."""

    shape: tuple[int, ...]
    bits_k: float
    bits_v: float
    dtype: torch.dtype = torch.bfloat16

    def encode(self, kv: Tensor, key: bytes, first: bool) -> Coded:
        return Coded([[self._rows(which, layer).encode(kv[which, layer].float()) for layer in range(self.shape[1])] for which in (0, 1)])

    def decode(self, data: Coded, key: bytes, out: Tensor) -> None:
        for which, layers in enumerate(data.parts):
            for layer, part in enumerate(layers):
                out[which, layer] = self._rows(which, layer).decode(*part)

    def _rows(self, which: int, layer: int) -> Any:
        bits = (self.bits_k, self.bits_v)[which]
        more = int((layer + 1) * (bits % 1) + 1e-9) - int(layer * (bits % 1) + 1e-9)
        return least_squares(self.shape[-1], int(bits) + more, which)


@cache
def least_squares(d: int, bits: int, seed: int) -> Any:
    """Rows with the gain of tqai 0.6."""
    from tqai_core.codecs.rows import Rows

    class Plain(Rows):
        def gain(self, y: Tensor, norm: Tensor, levels: Tensor) -> Tensor:
            return (y * levels).sum(-1) / levels.square().sum(-1).clamp_min(1e-30)

    return Plain(d, bits, seed, torch.device("cpu"))


@dataclass(frozen=True)
class Coded:
    parts: list[list[tuple[Tensor, Tensor]]]

    def __len__(self) -> int:
        return sum(x.nbytes for layers in self.parts for part in layers for x in part)


class Via:
    """A coder of exact blocks, through which another one's error goes; it measures the other."""

    def __init__(self, exact: Any, coder: Any) -> None:
        self.exact, self.coder, self.shape = exact, coder, exact.shape
        self.bytes, self.encode_ms, self.decode_ms = [], [], []

    def decode(self, data: bytearray, key: bytes, out: Tensor) -> None:
        kv = torch.empty(self.shape, dtype=self.coder.dtype)
        self.exact.decode(data, key, kv)
        _, first = self.exact.envelope.open(data, key)
        start = time.thread_time()
        packed = self.coder.encode(kv, key, first)
        middle = time.thread_time()
        self.coder.decode(packed, key, out)
        self.encode_ms.append(1e3 * (middle - start))
        self.decode_ms.append(1e3 * (time.thread_time() - middle))
        self.bytes.append(len(packed))


def coders(scene: Scene) -> dict[str, Any]:
    from tqai_core.hosts.vllm.options import Options
    from tqai_core.kv.block import BlockCoder

    form = scene.shelf.coder.format
    out = {}
    for label, bits in CODES.items():
        made = Options("-", bits).coder("bench", form.dtype, form.layers, form.heads, form.tokens, form.dim).format
        if label.endswith("no sinks"):
            made = replace(made, sinks=0, centre=False)
        out[label] = BlockCoder(made)
    return out


def quality(model: str, folder: Path) -> dict[str, Any]:
    """The next tokens after a restored prefix beside a full recompute, for every code; and packed copies for the next engine."""
    scene = Scene(model, folder / "exact", "exact")
    found = _quality(scene, Judge.of(model), coders(scene))
    _pack(scene, folder / "packed")
    scene.engine.close()
    return found


def plain(model: str, folder: Path) -> dict[str, Any]:
    """The same of the plain code at no fewer bytes, by an engine on the exact store of ``quality``."""
    scene = Scene(model, folder / "exact", "exact")
    shape = scene.shelf.coder.shape
    found = _quality(scene, Judge.of(model), {label: Rows(shape, *bits) for label, bits in PLAIN.items()})
    scene.engine.close()
    return found


def _quality(scene: Scene, judge: Judge, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in made}
    exact_coder = scene.shelf.coder
    per_token = exact_coder.format.nbytes / BLOCK
    for name, prefix, ids in prompts(scene.engine):
        with scene.without_loads():
            cold = scene.engine.ask(ids)
        assert cold.cached == 0, cold.cached
        scene.engine.drain()
        targets = torch.tensor(ids[prefix + 1 :])
        exact = cold.hidden[-1][-NEXT:]
        for label, coder in made.items():
            via = Via(exact_coder, coder)
            scene.shelf.coder = exact_coder if label == "exact" else via
            packed = scene.engine.ask(ids)
            scene.shelf.coder = exact_coder
            assert (packed.cached, len(packed.hidden[-1])) == (prefix, NEXT)
            row = judge.compare(exact, packed.hidden[-1])
            loss = [-judge.logits(h)[:-1].gather(1, targets[:, None]).mean().item() for h in (exact, packed.hidden[-1])]
            sizes = via.bytes or [len(data) for data in files(scene.root).values()]
            found[label].append({
                "text": name, "prefix": prefix, **row, "dnll": loss[1] - loss[0], "bytes": fmean(sizes) / BLOCK, "blocks": len(via.bytes),
                "encode_ms": median(via.encode_ms or [0]), "decode_ms": median(via.decode_ms or [0]),
            })  # fmt: skip
    rows = []
    for label, windows in found.items():
        row: dict[str, Any] = {"stored as": label, "bytes a token": _weighted(windows)}
        row["ratio"] = per_token / row["bytes a token"]
        row |= {key: fmean(w[key] for w in windows) for key in ("kl", "top1", "dnll")}
        row |= {f"kl {p}": fmean(w["kl"] for w in windows if w["prefix"] == p) for p in PREFIXES}
        for what in ("encode", "decode"):
            spent = median(w[f"{what}_ms"] for w in windows)
            row[f"{what} MB/s"] = exact_coder.format.nbytes / spent / 1e3 if spent else None
        rows.append(row)
    count = sum(prefix // BLOCK for _, prefix, _ in prompts(scene.engine))
    return {"rows": rows, "windows": len(TEXTS) * len(PREFIXES), "blocks": count, "bytes a token exact": per_token}


def _weighted(windows: list[dict[str, Any]]) -> float:
    """Mean over blocks: long prefixes have more."""
    if not windows[0]["blocks"]:
        return fmean(w["bytes"] for w in windows)
    return sum(w["bytes"] * w["blocks"] for w in windows) / sum(w["blocks"] for w in windows)


def _pack(scene: Scene, folder: Path) -> None:
    """The exact blocks once more, packed as an engine with the option ``bits`` would have written them."""
    from tqai_core.hosts.vllm.options import Options
    from tqai_core.kv.block_store import BlockStore

    form = scene.shelf.coder.format
    coder = Options(str(folder), BITS).coder(form.model, form.dtype, form.layers, form.heads, form.tokens, form.dim)
    store, kv = BlockStore(folder, coder.envelope.name), torch.empty(coder.shape, dtype=coder.dtype)
    for name, data in files(scene.root).items():
        scene.shelf.coder.decode(bytearray(data), name.encode(), kv)
        _, first = scene.shelf.coder.envelope.open(data, name.encode())
        store.put(name, coder.encode(kv, name.encode(), first))


def speed(model: str, folder: Path) -> dict[str, Any]:
    """A second engine on the folders of ``quality``: CPU time of one new token after each prefix, recomputed and restored, in turn."""
    from tqai_core.hosts.vllm.options import Options
    from tqai_core.kv.block_store import BlockStore
    from tqai_core.kv.shelf import Shelf

    scene = Scene(model, folder / "packed")
    form = scene.shelf.coder.format
    coder = Options("-", "exact").coder(form.model, form.dtype, form.layers, form.heads, form.tokens, form.dim)
    raw = Shelf(coder, BlockStore(folder / "exact", coder.envelope.name))
    packed, rows = scene.shelf, []
    wanted = [(p, ids) for name, p, ids in prompts(scene.engine) if name == "logits"]
    for prefix, ids in wanted:
        times: dict[str, list[float]] = {"recomputed": [], "packed": [], "raw": []}
        for again in range(4):
            with scene.without_store():
                cold = scene.engine.ask(ids)
            assert cold.cached == 0
            for label, shelf in (("packed", packed), ("raw", raw)):
                scene.worker._mover._shelf = shelf
                scene.planner._has = lambda name, shelf=shelf: shelf.store.has(f"{name}_0")
                found = scene.engine.ask(ids)
                assert found.cached == prefix, (label, found.cached)
                if again:
                    times[label].append(found.seconds)
            if again:
                times["recomputed"].append(cold.seconds)
        shelves = {"packed": packed, "raw": raw}
        held = {f"{label} bytes": _held(shelf, ids, scene) for label, shelf in shelves.items()}
        rows.append({"prefix": prefix, **{label: median(spent) for label, spent in times.items()}, **held})
    scene.engine.close()
    return {"rows": rows}


def _held(shelf: Any, ids: list[int], scene: Scene) -> int:
    """Bytes of the blocks that a prompt reads."""
    read: list[int] = []
    get = shelf.store.get
    shelf.store.get = lambda name: (read.append(shelf.store.path(name).stat().st_size), get(name))[1]
    scene.worker._mover._shelf = shelf
    scene.planner._has = lambda name: shelf.store.has(f"{name}_0")
    scene.engine.ask(ids)
    shelf.store.get = get
    return sum(read)


def tiers(model: str, folder: Path) -> dict[str, Any]:
    """The same below vLLM's own offloading."""
    engine = Engine(model, tier(folder, bits=BITS))
    manager = engine.core.scheduler.connector.connector_scheduler.manager
    rows = []
    for name, prefix, ids in prompts(engine):
        if name != "logits":
            continue
        spent = []
        engine.ask(ids)
        engine.drain()
        for again in range(4):
            engine.drain()
            manager.reset_cache()
            found = engine.ask(ids)
            assert found.cached == prefix, found.cached
            if again:
                spent.append(found.seconds)
        rows.append({"prefix": prefix, "tier packed": median(spent)})
    engine.close()
    return {"rows": rows}


FIGURES = {"quality": quality, "plain": plain, "speed": speed, "tiers": tiers}

if __name__ == "__main__":
    torch.manual_seed(0)
    say(FIGURES[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))
