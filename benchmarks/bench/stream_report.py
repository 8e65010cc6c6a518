"""``tqai bench stream --report``: the ten pipelines and seven model shapes that tqai 0.6 reports on, with bytes counted.

Same streams for every row: a Gaussian base plus fresh noise that fades over five steps, 64 tokens, the key-value heads of
each model. Everything is closed loop: a decoder gets what was sent and nothing else. All rows that predict spend 20 payload
bits a number over the five steps, 8 on the first. A third table asks which scorers carry signal: bits by score against
uniform bits at no more bytes, on this stream, on one with restless tokens planted in it, and on keys and values of the minis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tqai_core.codecs.bases import NMSE
from tqai_core.codecs.packing import pack, unpack
from tqai_core.codecs.vector import VectorCodec
from tqai_core.memory import Stream
from tqai_core.metrics import cosine
from tqai_core.registry import build
from tqai_core.stream import StreamCoder
from tqai_core.types import Packed, Step, nbytes, tensors_in

from . import kv
from .codec import nmse
from .harness import Mini, Row, Table, closing, machine, medians, one_thread, promises
from .stream import NOISE

SHAPES = {  # key-value heads, head dimension
    "Qwen2.5-0.5B": (2, 64), "Qwen2.5-3B": (2, 128), "Qwen2.5-7B": (4, 128), "Gemma-2B": (1, 256), "Gemma-7B": (16, 256),
    "Llama-3.1-8B": (8, 128), "WAN2.2-5B": (12, 128),
}  # fmt: skip
TOKENS = 64
BITS = (8, 4, 3, 3, 2)
CODEC = "trellis:short=0,mean=never"
CONFIGS: dict[str, dict[str, str]] = {
    "baseline": {},
    "palm+tiered": {"scorer": "palm", "strategy": "tiered"},
    "fisher+tiered": {"scorer": "fisher", "strategy": "tiered"},
    "palm+delta": {"scorer": "palm", "strategy": "delta"},
    "fisher+delta": {"scorer": "fisher", "strategy": "delta"},
    "snr+delta2": {"scorer": "snr", "strategy": "delta2"},
    "sheaf+delta2": {"scorer": "sheaf", "strategy": "delta2"},
    "palm+window": {"scorer": "palm", "strategy": "window"},
    "palm+tiered+stab": {"scorer": "palm", "strategy": "tiered", "monitor": "stability"},
    "snr+delta2+lyap": {"scorer": "snr", "strategy": "delta2", "monitor": "lyapunov"},
}
NOTES = {
    "palm+tiered": "tokens are alike here: no signal",
    "fisher+tiered": "no model, so no table: uniform bits",
    "palm+delta": "delta uses no score: delta alone",
    "fisher+delta": "no model, so no table: delta alone",
    "snr+delta2": "delta2 uses no score: best of nothing, value, line, fit a vector",
    "sheaf+delta2": "as snr+delta2",
    "palm+tiered+stab": "no attention here: palm+tiered",
}
SCORERS = ("change", "palm", "sheaf", "bsa", "random")
Score = Callable[[Tensor, Step], Tensor]  # [1, n, d] -> [1, n]


def fading(heads: int, d: int, seed: int) -> list[Tensor]:
    """Five steps ``[1, heads, 64, d]``: base + noise .1, .075, .05, .025, 0, fresh at each step."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(1, heads, TOKENS, d, generator=g)
    return [base + torch.randn(base.shape, generator=g) * s for s in NOISE]


def restless(heads: int, d: int, seed: int) -> list[Tensor]:
    """As :func:`fading`, but a quarter of the tokens has twice the noise and the others a quarter of it."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(1, heads, TOKENS, d, generator=g)
    scale = torch.where(torch.rand(1, heads, TOKENS, 1, generator=g) < 0.25, 2.0, 0.25)
    return [base + torch.randn(base.shape, generator=g) * (0.1 - 0.01 * t) * scale for t in range(len(NOISE))]


def scorer(name: str, seed: int = 0) -> Score:
    """A score of tokens by name; ``random`` is the control."""
    if name == "random":
        g = torch.Generator().manual_seed(seed)
        return lambda x, step: torch.rand(x.shape[:-1], generator=g)
    method, stream = build("scorer", name), Stream(build("codec", "exact"))
    return lambda x, step: method.score(x, step, stream)


@lru_cache(maxsize=64)
def _row_bytes(codec: VectorCodec, bits: int, d: int) -> int:
    """What one more vector costs, counted."""
    one, two = (replace(codec, bits=bits).encode(torch.ones(n, d)).nbytes for n in (1, 2))
    return two - one


@dataclass
class Tiered:
    """``delta`` with bits by score at the bytes of uniform width: the best scored tokens get one to three bits more, as many
    of the worst one bit less as pays for it, the others stay. The score ranks; how many move, or none, is what lowers the
    expected error most. Two flag bits a token where tokens moved.
    """

    score: Score
    bits: Sequence[int] = BITS
    codec: VectorCodec = field(default_factory=lambda: build("codec", CODEC))
    bytes_sent: int = 0
    value: Tensor | None = None
    count: int = 0
    moved: int = 0

    @property
    def nbytes(self) -> int:
        return nbytes(self.value)

    def encode(self, x: Tensor, step: Step) -> list[Packed]:
        rows, before = x.reshape(-1, x.shape[-1]).float(), self.value
        importance = self.score(x.reshape(1, *rows.shape).float(), step).reshape(-1)
        bits = self.bits[min(self.count, len(self.bits) - 1)]
        residual = rows if before is None else rows - before
        packed = [self._at(bits, residual)]
        if before is not None and bits > 1:
            energy = residual.square().sum(-1) / rows.square().sum(-1).clamp_min(1e-30)
            packed = self._tiers(packed[0], residual, energy, importance, bits) or packed
        self.value = self._decoded(packed, residual.shape, before)
        self.bytes_sent += sum(p.nbytes for p in packed)
        self.count += 1
        return packed

    def _tiers(self, plain: Packed, residual: Tensor, energy: Tensor, importance: Tensor, bits: int) -> list[Packed] | None:
        n, d = residual.shape
        size, low = _row_bytes(self.codec, bits, d), _row_bytes(self.codec, bits - 1, d)
        order = importance.argsort(descending=True, stable=True)
        total = torch.cat([energy.new_zeros(1), energy[order].cumsum(0)])
        side = 2 * n / 8 + 2 * nbytes(plain.tensors["span"])  # what the flags and two more packed tensors cost
        best, plan = float(total[-1]) * NMSE[bits] * 0.99, None
        for up in range(1, min(3, 8 - bits) + 1):
            high = _row_bytes(self.codec, bits + up, d)
            for fine in range(max(n // 32, 1), n // 2, max(n // 32, 1)):
                coarse = -(-int(fine * (high - size) + side) // (size - low))
                if fine + coarse > n:
                    break
                tops, rest, ends = total[fine], total[n - coarse] - total[fine], total[n] - total[n - coarse]
                error = float(tops * NMSE[bits + up] + rest * NMSE[bits] + ends * NMSE[bits - 1])
                if error < best:
                    best, plan = error, (up, fine, coarse)
        if plan is None:
            return None
        up, fine, coarse = plan
        tier = torch.ones(n, dtype=torch.uint8)
        tier[order[:fine]], tier[order[n - coarse :]] = 2, 0
        self.moved += fine + coarse
        parts = [self._at(b, residual[tier == t]) for t, b in ((2, bits + up), (1, bits), (0, bits - 1)) if bool((tier == t).any())]
        return [Packed("tiers", (n,), {"tiers": pack(tier[None], 2)}), *parts]

    def decode(self, steps: Iterable[list[Packed]], shape: Sequence[int]) -> list[Tensor]:
        """All steps from what was sent alone."""
        out: list[Tensor] = []
        value: Tensor | None = None
        for packed in steps:
            value = self._decoded(packed, (-1, shape[-1]), value)
            out.append(value.view(tuple(shape)))
        return out

    def _at(self, bits: int, rows: Tensor) -> Packed:
        return replace(self.codec, bits=bits).encode(rows)

    def _decoded(self, packed: list[Packed], shape: Sequence[int], before: Tensor | None) -> Tensor:
        values = [build("codec", p.codec).decode(p, torch.float32) for p in packed if p.codec != "tiers"]
        out = values[0]
        if packed[0].codec == "tiers":
            n = packed[0].shape[0]
            tier = unpack(packed[0].tensors["tiers"], n, 2).view(-1)
            out = torch.empty(n, shape[-1])
            for t, value in zip([t for t in (2, 1, 0) if bool((tier == t).any())], values, strict=True):
                out[tier == t] = value
        return out if before is None else before + out


@dataclass
class Reuse:
    """``window`` at this level: nothing is sent while the tensor is like the last one sent, and the decoder keeps that."""

    similarity: float = 0.95
    bits: int = 8
    codec: VectorCodec = field(default_factory=lambda: build("codec", CODEC))
    bytes_sent: int = 0
    value: Tensor | None = None
    skipped: int = 0

    @property
    def nbytes(self) -> int:
        return nbytes(self.value)

    def encode(self, x: Tensor, step: Step) -> Packed | None:
        if self.value is not None and float(torch.cosine_similarity(x.flatten(), self.value.flatten(), dim=0)) >= self.similarity:
            self.skipped += 1
            return None
        packed = replace(self.codec, bits=self.bits).encode(x)
        self.value = build("codec", packed.codec).decode(packed, torch.float32)
        self.bytes_sent += packed.nbytes
        return packed

    def decode(self, steps: Iterable[Packed | None], shape: Sequence[int]) -> list[Tensor]:
        out: list[Tensor] = []
        for packed in steps:
            out.append(out[-1] if packed is None else build("codec", packed.codec).decode(packed, torch.float32))
        return out


class Plain:
    """A :class:`StreamCoder`; with a monitor, steps that it forecasts are sent as the prediction alone (0 bits)."""

    def __init__(self, predictor: str, bits: Sequence[int], monitor: Any = None) -> None:
        self.coder, self.bits, self.monitor, self.skipped = StreamCoder(predictor, codec=CODEC, bits=tuple(bits)), tuple(bits), monitor, 0
        self.state: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        return self.coder.nbytes

    @property
    def bytes_sent(self) -> int:
        return self.coder.bytes_sent

    def encode(self, x: Tensor, step: Step) -> Packed:
        at = step.index
        width = self.bits[min(at, len(self.bits) - 1)]
        if self.monitor is not None:
            compute = self.monitor.decide(step, None, 0, self.state).compute
            self.skipped += not compute
            last = self.coder.last
            if compute:
                error = None if last is None else float((x - last).norm() / x.norm())
                self.monitor.observe(step, error, 0, self.state)
            else:
                width = 0
        self.coder.bits = (*self.bits[:at], width)
        return self.coder.encode(x, step.sigma)

    def decode(self, steps: Iterable[Packed], shape: Sequence[int]) -> list[Tensor]:
        return self.coder.decode(steps)


def coder(config: dict[str, str]) -> Any:
    """What codes a stream under one of :data:`CONFIGS`. ``delta2`` picks the order a vector, as the strategy of tqai 0.6
    falls back from second differences to first ones."""
    strategy = config.get("strategy", "none")
    if strategy == "window":
        return Reuse()
    if strategy == "tiered" and config["scorer"] != "fisher":
        return Tiered(scorer(config["scorer"]))
    monitor = build("monitor", "lyapunov:tau=0.03,warmup=1,min_steps=1") if config.get("monitor") == "lyapunov" else None
    predictor = {"none": "none", "delta2": "choice"}.get(strategy, "delta")
    return Plain(predictor, (4,) if strategy == "none" else BITS, monitor)


def _flat(sent: Any) -> list[Packed]:
    return [] if sent is None else sent if isinstance(sent, list) else [sent]


def run(make: Callable[[], Any], steps: Sequence[Tensor]) -> Row:
    """Code and decode a stream: error, bytes, time. What is decoded comes from what was sent alone; held are the state and the
    newest payload, as they are for tqai 0.6."""
    one, sent, spent = make(), [], []
    for i, x in enumerate(steps):
        step = Step(i, 1 - i / len(steps), len(steps), i == len(steps) - 1)
        began = time.process_time()
        sent.append(one.encode(x, step))
        spent.append(time.process_time() - began)
    decoded = one.decode(sent, steps[0].shape)
    size = sum(x.numel() for x in steps)
    return {
        "nmse": sum(nmse(x, y) for x, y in zip(steps, decoded, strict=True)) / len(steps),
        "cosine": sum(cosine(y, x) for x, y in zip(steps, decoded, strict=True)) / len(steps),
        "ms": sum(spent) / len(steps) * 1e3, "bits": one.bytes_sent * 8 / size, "sent": one.bytes_sent,
        "held": one.nbytes + nbytes(list(tensors_in([p.tensors for p in _flat(sent[-1])]))),
        "raw16": steps[0].numel() * 2, "skipped": getattr(one, "skipped", 0),
        "moved": getattr(one, "moved", 0) / (size // steps[0].shape[-1]),
    }  # fmt: skip


def bench(seeds: Sequence[int] = (0, 1, 2), peers: bool = True, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    one_thread()
    rows: list[Row] = []
    upstream, missing = _upstream() if peers else (None, {})
    run(lambda: coder(CONFIGS["baseline"]), fading(2, 64, 0))  # tables are built once, and are part of no figure
    for shape, (heads, d) in SHAPES.items():
        tell(f"{shape}: {heads} heads of {d}")
        streams = [fading(heads, d, seed) for seed in seeds]
        for name, config in CONFIGS.items():
            ours = medians([run(lambda c=config: coder(c), steps) for steps in streams])  # type: ignore[misc]
            row: Row = {"shape": shape, "config": name, **ours}
            if upstream is not None:
                row["upstream"] = medians([upstream(config, steps) for steps in streams])
            rows.append(row)
        line = medians([run(lambda: Plain("delta2", BITS), steps) for steps in streams])
        rows.append({"shape": shape, "config": "(delta2, always the line)", **line})
    result = {
        "bench": "stream report", "machine": machine(), "seeds": list(seeds), "bits": list(BITS), "missing": missing, "rows": rows,
        "scorers": _scorers(seeds, tell), "notes": NOTES,
    }  # fmt: skip
    result["verdicts"] = verdicts(result)
    return result


def _scorers(seeds: Sequence[int], tell: Callable[[str], None]) -> list[Row]:
    """Bits by score against uniform bits, delta both, at no more bytes."""
    data: dict[str, list[list[Tensor]]] = {
        "fading (as above)": [fading(8, 128, seed) for seed in seeds],
        "restless tokens planted": [restless(8, 128, seed) for seed in seeds],
    }
    for kind, count in (("flux", 2), ("sd3", 2), ("wan", 1)):
        tell(f"{kind}: keys and values")
        mini = Mini(kind)
        mini.schedule("euler", 1.0)
        found = kv.collect(mini, list(range(count)), seed=0, steps=12)
        data[f"{kind}, keys and values"] = [kv.branch(x, kind) for name, x in found.items() if name[-1] in "kv"]
    out = []
    for name, streams in data.items():
        uniform = [run(lambda: Plain("delta", BITS), steps) for steps in streams]
        for what in SCORERS:
            tell(f"{name}: {what}")
            tiered = [run(lambda w=what: Tiered(scorer(w)), steps) for steps in streams]  # type: ignore[misc]
            ratio = median(t["nmse"] / u["nmse"] for t, u in zip(tiered, uniform, strict=True))
            out.append({
                "data": name, "scorer": what, "uniform": sum(u["nmse"] for u in uniform) / len(uniform),
                "tiered": sum(t["nmse"] for t in tiered) / len(tiered), "moved": sum(t["moved"] for t in tiered) / len(tiered),
                "ratio": ratio, "bytes": max(t["sent"] / u["sent"] for t, u in zip(tiered, uniform, strict=True)),
                "signal": ratio < 0.97,
            })  # fmt: skip
    return out


def _upstream() -> tuple[Callable[[dict[str, str], list[Tensor]], Row] | None, dict[str, str]]:
    """tqai 0.6 on the same streams, as its own benchmark drives it (4 bits, 2 in the low tier)."""
    try:
        import tqai.monitors
        import tqai.scorers
        import tqai.strategies  # noqa: F401
        from tqai.backend import get_backend
        from tqai.config import TurboQuantConfig
        from tqai.pipeline import build_pipeline
        from tqai.quantizer import PolarQuantizer
    except ImportError as error:
        return None, {"tqai 0.6 (upstream)": f"{error}: pip install --no-deps --target DIR tqai==0.6.1, and DIR on PYTHONPATH"}

    def measure(config: dict[str, str], steps: list[Tensor]) -> Row:
        ops, d = get_backend("torch"), steps[0].shape[-1]
        high, low = (PolarQuantizer(head_dim=d, bits=bits, seed=seed, ops=ops) for bits, seed in ((4, 42), (2, 10042)))
        settings = TurboQuantConfig(bits_k=4, bits_v=2, backend="torch", pipeline=config or None)
        pipe = build_pipeline(settings, quantizer=high, quantizer_low=low)
        errors, cosines, spent, sent, payload = [], [], 0.0, 0, None
        for i, x in enumerate(steps):
            began = time.process_time()
            payload = pipe.compress(x, layer_idx=0, step=i, context={"total_steps": len(steps)})
            spent += time.process_time() - began
            y = torch.as_tensor(pipe.decompress(payload, layer_idx=0)).float()
            errors.append(nmse(x, y))
            cosines.append(cosine(y, x))
            sent += _walked(payload)
        state = [v for k, v in vars(pipe).items() if "quantizer" not in k]
        size = sum(x.numel() for x in steps)
        return {
            "nmse": sum(errors) / len(errors), "cosine": sum(cosines) / len(cosines), "ms": spent / len(steps) * 1e3,
            "bits": sent * 8 / size, "sent": sent, "held": _walked([payload, state]), "raw16": steps[0].numel() * 2,
        }  # fmt: skip

    return measure, {}


def _walked(thing: Any) -> int:
    """Bytes of the distinct arrays under ``thing``, NumPy's too."""
    import numpy as np

    seen: dict[int, int] = {}
    visited: set[int] = set()

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, np.ndarray):
            base = x if x.base is None or not isinstance(x.base, np.ndarray) else x.base
            seen[base.__array_interface__["data"][0]] = base.nbytes
        elif id(x) not in visited and not isinstance(x, (str, int, float, type)) and type(x).__name__ != "PolarQuantizer":
            visited.add(id(x))
            inner = x if isinstance(x, (list, tuple, set)) else (x if isinstance(x, dict) else getattr(x, "__dict__", {})).values()
            for value in list(inner):
                walk(value)

    walk(thing)
    return sum(seen.values())


def table(rows: Sequence[Row]) -> list[Row]:
    """Mean over the shapes, a row a config, with the error against the baseline's."""
    out = []
    for name in dict.fromkeys(r["config"] for r in rows):
        mine = [r for r in rows if r["config"] == name]
        mean = {k: sum(r[k] for r in mine) / len(mine) for k in ("nmse", "cosine", "ms", "bits", "sent", "held", "raw16", "skipped")}
        if "upstream" in mine[0]:
            mean["upstream"] = {k: sum(r["upstream"][k] for r in mine) / len(mine) for k in mine[0]["upstream"]}
        out.append({"config": name, **mean})
    base = out[0]
    for row in out:
        row["versus"] = row["nmse"] / base["nmse"] - 1
        if "upstream" in row:
            row["upstream"]["versus"] = row["upstream"]["nmse"] / base["upstream"]["nmse"] - 1
    return out


def best(rows: Sequence[Row]) -> list[Row]:
    """The config of least error a shape, among those that send no more than the baseline and 3 % (its side information)."""
    out = []
    for shape in SHAPES:
        mine = [r for r in rows if r["shape"] == shape and not r["config"].startswith("(")]
        base = mine[0]
        able = [r for r in mine if r["sent"] <= base["sent"] * 1.03]
        out.append(min(able, key=lambda r: r["nmse"]) | {"versus": min(r["nmse"] for r in able) / base["nmse"] - 1})
    return out


def verdicts(result: dict[str, Any]) -> list[Row]:
    out: list[Row] = []
    need = promises(out)
    mean = {r["config"]: r for r in table(result["rows"])}
    for name in ("palm+delta", "snr+delta2"):
        need(f"{name}: mean NMSE at {sum(result['bits'])} payload bits", mean[name]["nmse"], most=1e-4)
    need("tiered / uniform bytes, the most of any stream and scorer", max(r["bytes"] for r in result["scorers"]), most=1.0)
    planted = next(r for r in result["scorers"] if (r["data"], r["scorer"]) == ("restless tokens planted", "change"))
    need("planted signal: tiered / uniform NMSE at equal bytes", planted["ratio"], most=0.97)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    head = ["config", "NMSE", "vs base", "cosine", "comp ms", "sent B", "held B"]
    cells = lambda r: [  # noqa: E731
        f"{r['nmse']:.2e}", f"{r['versus']:+.1%}", f"{r['cosine']:.5f}", f"{r['ms']:.2f}", f"{r['sent']:,.0f}", f"{r['held']:,.0f}",
    ]  # fmt: skip
    rows = table(result["rows"])
    body = []
    for r in rows:
        note = result["notes"].get(r["config"], "")
        if "lyap" in r["config"] and not r["skipped"]:
            note = "no forecast within tau .03: as snr+delta2"
        if r["skipped"]:
            note = f"{r['skipped']:g} of 5 steps not coded, {1 - r['ms'] / rows[0]['ms']:.0%} of the baseline's time saved"
        body.append([r["config"], *cells(r), note])
    title = f"ten pipelines, mean over {len(SHAPES)} shapes; one tensor in fp16 is {rows[0]['raw16']:,.0f} B, five are sent; closed loop"
    yield title, [*head, "note"], body
    if "upstream" in rows[0]:
        other = [[r["config"], *cells(r["upstream"])] for r in rows if "upstream" in r]
        yield "tqai 0.6.1 on the same streams, measured; its delta hands the raw last tensor to its decoder", head, other
    winners = [[r["shape"], r["config"], *cells(r)] for r in best(result["rows"])]
    yield "best a model shape, of those that send no more than the baseline (3 % for side information)", ["shape", *head], winners
    signal = [
        [r["data"], r["scorer"], f"{r['uniform']:.2e}", f"{r['tiered']:.2e}", f"{r['moved']:.0%}", f"{r['ratio']:.2f}", f"{r['bytes']:.3f}",
         "carries signal" if r["signal"] else "no signal: uniform is as good" if r["ratio"] < 1.03 else "loses to uniform"]
        for r in result["scorers"]
    ]  # fmt: skip
    yield (
        "bits by score (tiered) against uniform bits, delta both, at no more bytes; ratio: median over streams",
        ["stream", "scorer", "uniform NMSE", "tiered NMSE", "tokens moved", "ratio", "bytes", "says"],
        signal,
    )
    yield from closing(result)
