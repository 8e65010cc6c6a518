"""``tqai bench rolling``: the history of a video that grows block by block, packed, beside other ways to hold it in fewer bits.

The model is the causal mini (:mod:`bench.causal`): 64 frames in blocks of four, each of which reads the first four frames and the last
24. The first and the last four of them are exact for everybody, the 20 between are packed, a group of four as it leaves the last ones.
Keys are held before rotary positions. Each row of the batch is a seed and a digit of its own. "One block": every history holds the same
true frames, and the velocity of one block is compared; this does not drift. "Outliers" is the same function with four key channels 125
times as large, and those of the queries as much smaller. Bits are those of the packed numbers, everything counted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tqai_core as tqai
from tqai_core.codecs import packing
from tqai_core.codecs.rotation import matrix
from tqai_core.hosts.diffusers import minis
from tqai_core.kv.rolling import Rolling
from tqai_core.metrics import nmse, psnr
from tqai_core.minis import digits
from tqai_core.types import nbytes

from .causal import BLOCK, SINK, TOKENS, WINDOW, Causal, Dense, History, log, trained
from .harness import Row, Table, closing, machine, one_thread, promises

FRAMES, STEPS, PART = 64, 3, 8  # PART: frames of a window
HELD = WINDOW - BLOCK
OUTLIERS, FACTOR = [6, 7, 40, 41], 125.0
CHOSEN = (9, 13)  # blocks of "one block": all packed places are taken
SIGMA = 0.5
OURS, HALF = "tqai, 2 bits", "tqai, 1 bit"
MEANS = "k-means"  # how the peers with centroids begin
FREE = "centroids not counted"

Held = tuple[Tensor, int]  # what is read back of keys or values [n, H, D] of one sequence, and the bytes that were held


@dataclass(frozen=True)
class Integers:
    """Unsigned integers with an fp16 scale and zero point for each group of numbers, as KIVI (2402.02750): along tokens for keys
    (``by_channel``), else along channels. ``rotated``: by a random Hadamard matrix of the group first, symmetric, no zero point."""

    bits: int
    group: int = 64
    rotated: bool = False

    def hold(self, x: Tensor, keys: bool, seed: int) -> Held:
        by_channel = keys and not self.rotated
        y = x.movedim(0, -1) if by_channel else x
        flat = y.reshape(-1, self.group)
        turn = matrix(self.group, 0)
        flat = flat @ turn.T if self.rotated else flat
        most, low = 2**self.bits - 1, flat.amin(-1, keepdim=True)
        if self.rotated:
            low = -flat.abs().amax(-1, keepdim=True)
            scale = (-2 * low / most).clamp_min(1e-7).half()
            zero = -scale.float() * most / 2
        else:
            scale, zero = ((flat.amax(-1, keepdim=True) - low) / most).clamp_min(1e-7).half(), low.half().float()
        codes = ((flat - zero) / scale).round().clamp(0, most)
        held = [packing.pack(codes.to(torch.uint8), self.bits), scale, *([] if self.rotated else [zero.half()])]
        back = codes * scale + zero
        back = (back @ turn if self.rotated else back).view(y.shape)
        return back.movedim(-1, 0) if by_channel else back, nbytes(held)


@dataclass(frozen=True)
class Centroids:
    """Progressive residual quantisation of Quant-VideoGen (2602.02958), one stage: k-means over the tokens of a group and head; bf16
    centroids, a byte of index, and what is left in integers of two bits in groups of 64 with scales of 8 bits. ``zero``: with zero points,
    of four levels instead of three. ``counted``: whether the centroids are; in a long video many groups would share them."""

    count: int
    zero: bool = False
    counted: bool = True

    def hold(self, x: Tensor, keys: bool, seed: int) -> Held:
        parts = [self._head(part, seed) for part in x.unbind(1)]
        return torch.stack([part for part, _ in parts], 1), sum(size for _, size in parts)

    def _head(self, x: Tensor, seed: int) -> Held:
        pick = torch.randint(0, len(x), (self.count,), generator=torch.Generator().manual_seed(seed))
        centres, before = x[pick], None
        for _ in range(100):
            nearest = torch.cdist(x, centres).argmin(1)
            if before is not None and bool((nearest == before).all()):
                break
            before = nearest
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            sizes = nearest.bincount(minlength=self.count)[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        centres = centres.bfloat16()
        rest = (x - centres[nearest].float()).view(-1, 64)
        low = rest.amin(-1, keepdim=True) if self.zero else -rest.abs().amax(-1, keepdim=True)
        scale = ((rest.amax(-1, keepdim=True) - low) / 3 if self.zero else -low).clamp_min(1e-10).to(torch.float8_e4m3fn)
        zero = low.to(torch.float8_e4m3fn).float() if self.zero else -scale.float()
        codes = ((rest - zero) / scale.float().clamp_min(1e-10)).round().clamp(0, 3 if self.zero else 2)
        held = [
            packing.pack(codes.to(torch.uint8), 2),
            scale,
            nearest.to(torch.uint8),
            *([zero.to(torch.float8_e4m3fn)] if self.zero else []),
        ]
        back = (codes * scale.float() + zero).view_as(x) + centres[nearest].float()
        return back, nbytes([held, centres if self.counted else None])


@dataclass
class Peer:
    """A history whose groups are held by a scheme. What is read back stands beside the count of bytes."""

    scheme: Integers | Centroids
    exact: Dense = field(default_factory=lambda: Dense(SINK + BLOCK))
    groups: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    made: int = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        before = self.exact.get()
        if before is not None and before[0].shape[1] == (SINK + BLOCK) * TOKENS:
            pair = [x[:, SINK * TOKENS :] for x in before]
            self.made += 1
            found = [[self.scheme.hold(row, which == 0, self.made) for row in x] for which, x in enumerate(pair)]
            keys, values = (torch.stack([x for x, _ in one]) for one in found)
            self.groups.append((keys, values, sum(size for one in found for _, size in one)))
            self.groups = self.groups[-(HELD - SINK - BLOCK) // BLOCK :]
        self.exact.append(k, v)

    def get(self) -> tuple[Tensor, Tensor] | None:
        held = self.exact.get()
        if held is None or not self.groups:
            return held
        at = SINK * TOKENS
        parts = zip(*(group[:2] for group in self.groups), strict=True)
        keys, values = (torch.cat([x[:, :at], *middle, x[:, at:]], 1) for x, middle in zip(held, parts, strict=True))
        return keys, values

    @property
    def nbytes_packed(self) -> int:
        return sum(size for *_, size in self.groups)


class Ours(Rolling):
    """The history of tqai, which is shown the queries too."""

    def __init__(self, bits: float) -> None:
        super().__init__(TOKENS, sink=SINK, recent=BLOCK, window=HELD, group=BLOCK, bits_k=bits, bits_v=bits)
        self.queries: Tensor | None = None

    def append(self, k: Tensor, v: Tensor, q: Tensor | None = None) -> None:
        super().append(k, v, self.queries if q is None else q)


@dataclass
class Together:
    """Reads one history and fills them all: each holds the same true frames."""

    first: History
    others: Sequence[History]

    def get(self) -> tuple[Tensor, Tensor] | None:
        return self.first.get()

    def append(self, k: Tensor, v: Tensor) -> None:
        for one in (self.first, *self.others):
            one.append(k, v)


METHODS: dict[str, Callable[[], Any]] = {
    OURS: lambda: Ours(2), HALF: lambda: Ours(1),
    "int8, groups of 64": lambda: Peer(Integers(8)), "int4, groups of 64": lambda: Peer(Integers(4)),
    "int2, groups of 64": lambda: Peer(Integers(2)),
    "rotated int4, groups of 256": lambda: Peer(Integers(4, 256, rotated=True)),
    f"{MEANS} (4) and int2": lambda: Peer(Centroids(4)), f"{MEANS} (2) and int2 with zero points": lambda: Peer(Centroids(2, zero=True)),
    f"{MEANS} (16) and int2 with zero points, {FREE}": lambda: Peer(Centroids(16, zero=True, counted=False)),
}  # fmt: skip


def bench(tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress."""
    one_thread()
    tell("AnyFlow-FAR, time")
    return joined({"anyflow": _anyflow(), "speed": _speed()} | measure(tell=tell))


def measure(
    names: Sequence[str] = tuple(METHODS), videos: int = 8, frames: int = FRAMES, tell: Callable[[str], None] = lambda text: None
) -> Row:
    """The histories of ``names``, over as many seeds as ``videos``."""
    model, found = trained(), Roll(tuple(range(videos)), frames)
    tell("the video without compression")
    exact, accuracy = found.run(model, lambda: Dense(HELD))
    lines: list[Row] = [{"method": name, **_line(found, model, name, exact, tell)} for name in names]
    for variant in ("plain", "outliers"):
        tell(f"one block, {variant}")
        if variant == "outliers":
            fold(model)
        for line, errors in zip(lines, _blocks(model, names, videos, frames), strict=True):
            line[f"block_{variant}"] = errors
    return {"seeds": list(found.seeds), "frames": frames, "accuracy": accuracy, "rows": lines}


def joined(*parts: Row) -> Row:
    """The result of parts that were measured one after the other, each with its own histories."""
    assert all(part["accuracy"] == parts[0]["accuracy"] for part in parts), "the videos without compression differ"
    lines = [row for name in METHODS for part in parts for row in part["rows"] if row["method"] == name]
    result = {"bench": "rolling", "machine": machine(), "steps": STEPS, "trained": log()} | parts[0] | {"rows": lines}
    return result | {"verdicts": verdicts(result)}


@dataclass(frozen=True)
class Roll:
    """The same videos, each time with another history."""

    seeds: tuple[int, ...]
    frames: int

    @property
    def labels(self) -> Tensor:
        return torch.tensor([seed % 10 for seed in self.seeds])

    @property
    def prompt(self) -> Tensor:
        return minis.prompts("wan", self.labels)[0]

    def run(self, model: Causal, history: Callable[[], History]) -> tuple[Tensor, list[float]]:
        """The videos, and the share of frames that are read as what was asked for, by windows."""
        noise = torch.stack([torch.randn(1, self.frames, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds])
        begin(model, [history() for _ in model.readers])
        video = model.roll(noise, self.prompt, STEPS)
        return video, [digits.accuracy(part, self.labels) for part in video.split(PART, 2)]


def begin(model: Causal, histories: Sequence[Any]) -> None:
    """New histories; those of tqai see the queries."""

    def see(held: Any) -> Callable[[Tensor], None]:
        ours = [one for one in (held, *getattr(held, "others", ())) if isinstance(one, Ours)]

        def show(q: Tensor) -> None:
            for one in ours:
                one.queries = q

        return show

    model.begin(histories, [see(held) for held in histories])


def fold(model: Causal) -> None:
    """Outlier channels in the keys; queries take them back."""
    for block in model.net.blocks:
        block.attn1.norm_k.weight.data[OUTLIERS] *= FACTOR
        block.attn1.norm_q.weight.data[OUTLIERS] /= FACTOR


def _line(found: Roll, model: Causal, name: str, exact: Tensor, tell: Callable[[str], None]) -> Row:
    tell(name)
    made: list[Any] = []

    def history() -> Any:
        made.append(METHODS[name]())
        return made[-1]

    video, accuracy = found.run(model, history)
    pairs = list(zip(video.split(PART, 2), exact.split(PART, 2), strict=True))
    return {
        "bits": median(bits(one) for one in made), "accuracy": accuracy,
        "psnr": [_finite(median(psnr(x, y) for x, y in zip(own, theirs, strict=True))) for own, theirs in pairs],
    }  # fmt: skip


def _finite(x: float) -> float | None:
    """None for videos that are equal."""
    return x if math.isfinite(x) else None


def bits(history: Any) -> float:
    """Bits held of a packed number, at the end of a video; of a video so short that nothing is packed 0."""
    keys, values = history.get()
    packed = keys.shape[1] - (SINK + BLOCK) * TOKENS
    return 8 * history.nbytes_packed / max(packed * (keys[:, 0].numel() + values[:, 0].numel()), 1)


@torch.no_grad()
def _blocks(model: Causal, methods: Sequence[str], count: int, frames: int) -> list[float]:
    """NMSE in dB of the velocity of one block, of each method: the median over blocks and clips."""
    clips, labels = digits.clips(count, seed=99, frames=frames)
    prompt = minis.prompts("wan", labels)[0]
    histories = [[METHODS[name]() for _ in model.readers] for name in methods]
    lead = [Dense(HELD) for _ in model.readers]
    filled = [Together(one, others) for one, others in zip(lead, zip(*histories, strict=True), strict=True)]
    errors: list[list[float]] = [[] for _ in methods]
    for number, clean in enumerate(clips.split(BLOCK, 2)):
        if number in CHOSEN:
            x = SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(number)) + (1 - SIGMA) * clean
            begin(model, lead)
            exact = model.velocity(x, SIGMA, prompt)
            for own, error in zip(histories, errors, strict=True):
                begin(model, own)
                error += [nmse(a, b) for a, b in zip(model.velocity(x, SIGMA, prompt), exact, strict=True)]
        begin(model, filled)
        model.keep(clean, prompt)
    return [float(10 * torch.tensor(error).median().log10()) for error in errors]


def _speed() -> Row:
    """CPU time of an evaluation of a full history, one clip, beside the dense one: interleaved."""
    model, clip = trained(), digits.clips(1, seed=5, frames=FRAMES // 2 + BLOCK)[0]
    prompt = minis.prompts("wan", [3])[0]
    kinds = {"dense": [Dense(HELD) for _ in model.readers], "packed": [METHODS[OURS]() for _ in model.readers]}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for histories in kinds.values():
        begin(model, histories)
        for part in clip.split(BLOCK, 2):
            model.keep(part, prompt)
    for _ in range(9):
        for name, histories in kinds.items():
            begin(model, histories)
            start = time.process_time()
            model.velocity(clip[:, :, :BLOCK], SIGMA, prompt)
            times[name].append(time.process_time() - start)
    return {"tokens": HELD * TOKENS, "ratio": median(times["packed"]) / median(times["dense"])}


def _anyflow() -> Row:
    """What the one pipeline of diffusers keeps that makes video in this way, seen by its transformer: tiny random weights."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    import pipelines

    family, seen = pipelines.family("anyflow_far"), []
    pipe = family.pipe()
    pipe.transformer.register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs["kv_cache"]), with_kwargs=True)
    family.call(pipe, 2, 0)
    held = [x for layer in seen[0].values() for x in layer.values()]
    try:
        tqai.apply(pipe, tqai.Config(level="kv"))
        refused = False
    except tqai.TqaiError:
        refused = True
    return {
        "pipeline": type(pipe).__name__,
        "kinds": sorted({type(x).__name__ for x in (seen[0], *held)}),
        "bytes": nbytes(held),
        "refused": refused,
    }


def verdicts(result: Row) -> list[Row]:
    """What the packed history promises."""
    out: list[Row] = []
    need = promises(out)
    at = {row["method"]: row for row in result["rows"]}
    ours, means = at[OURS], [row for name, row in at.items() if name.startswith(MEANS) and not name.endswith(FREE)]
    need("tqai, 2 bits: bits held of a packed number", ours["bits"], most=2.5)
    for row in means:
        need(f"tqai, 2 bits: bits held, of those of {row['method']}", ours["bits"] / row["bits"], most=1.05)
    parts = [(x, max(row["psnr"][i] for row in means)) for i, x in enumerate(ours["psnr"]) if x is not None]
    need("tqai, 2 bits: dB above k-means and int2, in the worst window", min(a - b for a, b in parts), least=0)
    for variant in ("plain", "outliers"):
        peer = min(row[f"block_{variant}"] for name, row in at.items() if name.startswith(MEANS))
        need(f"tqai, 2 bits: dB of one block below k-means and int2, {variant}", peer - ours[f"block_{variant}"], least=0)
    need("tqai, 2 bits: dB of one block lost with outlier channels", ours["block_outliers"] - ours["block_plain"], most=1.0)
    return out


def _drift(windows: Sequence[float | None]) -> str:
    some = [x for x in windows if x is not None]
    return f"{some[-1] - some[0]:+.1f}" if some else ""


def tables_of(result: Row) -> Iterable[Table]:
    """The tables of the result."""
    lines = sorted(result["rows"], key=lambda row: -row["block_plain"])
    parts = [f"{i}-{i + PART}" for i in range(0, result["frames"], PART)]
    cells = [[row["method"], f"{row['bits']:.2f}", f"{row['block_plain']:.1f}", f"{row['block_outliers']:.1f}"] for row in lines]
    yield "one block", ["history", "bits held of a packed number", "NMSE dB of a block", "with outlier channels"], cells
    drift = [[row["method"], *("exact" if x is None else f"{x:.1f}" for x in row["psnr"]), _drift(row["psnr"])] for row in lines]
    head = ["history", *parts, "last window, of the first that differs"]
    yield "whole video: PSNR dB to the one without compression, by windows of frames", head, drift
    found = [("without compression", result["accuracy"]), *((row["method"], row["accuracy"]) for row in lines)]
    read = [[name, *(f"{100 * x:.0f}" for x in shares)] for name, shares in found]
    yield "whole video: frames read as the digit asked for, %", ["history", *parts], read
    speed = result["speed"]
    yield "speed", ["history", "tokens", "time of an evaluation / dense"], [[OURS, f"{speed['tokens']:,}", f"{speed['ratio']:.2f}"]]
    far = result["anyflow"]
    cells = [[far["pipeline"], " of ".join(reversed(far["kinds"])), f"{far['bytes'] / 2**10:.0f}", "yes" if far["refused"] else "no"]]
    yield "out of reach", ["pipeline", "its cache", "KiB at its first call, tiny weights", "refused by `tqai.apply`"], cells
    yield from closing(result)
