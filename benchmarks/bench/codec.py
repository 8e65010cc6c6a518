"""``tqai bench codec``: rate and distortion, speed, memory and attention error of the codecs, beside their peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tqai_core.registry import build
from tqai_core.types import nbytes

from . import kv
from .bases import calibrate
from .harness import Mini, Row, Table, child, closing, machine, one_thread, promises
from .peers import available
from .plot import Chart

VECTORS = 8192
UPSTREAM = "tqai 0.6 (upstream)"


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    """Gaussian directions with log-normal norms (sigma .5)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.exp(0.5 * torch.randn(n, 1, generator=g))


def nmse(x: Tensor, y: Tensor) -> float:
    """Mean over vectors of |x - y|^2 / |x|^2."""
    return float(((x - y).square().sum(-1) / x.square().sum(-1).clamp_min(1e-30)).mean())


def clock(*calls: Callable[[], Any], rounds: int = 21) -> list[list[float]]:
    """CPU seconds of each call in each round, interleaved so that the machine's mood hits all alike; each right after an
    untimed one of its own, or the peer before it would decide what lies in the cache."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            call()
            began = time.process_time()
            call()
            spent.append(time.process_time() - began)
    return times


PEAK = """
import torch
from tqai_core.peak import status
name, vectors = sys.argv[1], int(sys.argv[2])
x = torch.randn(vectors, 128, generator=torch.Generator().manual_seed(0))
if name in ("turbo", "trellis"):
    import tqai_core
    encode = tqai_core.codec(name + ":bits=4").encode
else:
    from bench.peers import PEERS
    make = PEERS[name]()[0]
    encode = lambda x: make(x, 4)
encode(x[:2048])
found = {"peak": None}
try:
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")
    held = encode(x)
    found["peak"] = max(status("VmHWM:") - before, 0)
except OSError:
    pass
"""


def peak(name: str, vectors: int) -> int | None:
    """Bytes of resident memory that encoding adds at its highest point, its result included, in a process of its own;
    None where the system does not tell."""
    return child(PEAK, name, str(vectors))["peak"]


def bench(peers: bool = True, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    one_thread()
    found, missing = available() if peers else ({}, {})
    tell("rate and distortion, Gaussian directions")
    rate = _rate()
    tell("speed")
    speed = _speed(found)
    tell("memory")
    memory = _memory(found)
    tell("keys and values of the minis: calibrated bases, attention")
    real, attention = _real(found)
    result = {
        "bench": "codec", "machine": machine(), "vectors": VECTORS, "missing": missing, "rate": rate, "speed": speed,
        "memory": memory, "klt": real, "attention": attention,
    }  # fmt: skip
    result["verdicts"] = verdicts(result)
    return result


def _rate() -> list[Row]:
    rows = []
    for d in (64, 128, 256):
        x = gaussian(VECTORS, d)
        for bits in range(1, 9):
            for name in ("turbo", "trellis"):
                codec = build("codec", {"name": name, "bits": bits, "mean": "never"})
                packed = codec.encode(x)
                error = nmse(x, codec.decode(packed))
                rate = packed.nbytes * 8 / x.numel()
                rows.append({"codec": name, "d": d, "bits": rate, "nmse": error, "gap_db": 10 * math.log10(error * 4**rate)})
    return rows


def _speed(found: dict[str, Any]) -> list[Row]:
    x = gaussian(VECTORS, 128)
    size = x.numel() * 4 / 1e6
    rows = []
    for bits in (4, 2):
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        held: dict[str, tuple[int, Tensor]] = {}
        for name, (encode, decode) in found.items():
            packed = encode(x, bits)
            calls[name] = (lambda e=encode, b=bits: e(x, b), lambda d=decode, p=packed: d(p))
            held[name] = (nbytes(packed[1] if name.startswith("tqai") else packed), decode(packed))
        for name in ("turbo", "trellis"):
            codec = build("codec", {"name": name, "bits": bits})
            packed = codec.encode(x)
            calls[name] = (lambda c=codec: c.encode(x), lambda c=codec, p=packed: c.decode(p, torch.bfloat16))
            held[name] = (packed.nbytes, codec.decode(packed))
        encode_s = dict(zip(calls, clock(*(e for e, _ in calls.values())), strict=True))
        decode_s = dict(zip(calls, clock(*(d for _, d in calls.values()), rounds=45), strict=True))
        for name, (size_held, y) in held.items():
            row = {"codec": name, "bits": bits, "held_bits": size_held * 8 / x.numel(), "nmse": nmse(x, y.float())}
            for what, spent in (("encode", encode_s), ("decode", decode_s)):
                row[what] = size / median(spent[name])
                if UPSTREAM in spent:  # of two calls of one round: drift of the machine cancels
                    row[f"{what}_ratio"] = median(up / own for up, own in zip(spent[UPSTREAM], spent[name], strict=True))
            rows.append(row)
    return rows


def _memory(found: dict[str, Any]) -> list[Row]:
    vectors = 131072  # 64 MiB of fp32
    names = ["turbo", "trellis", *(n for n in ("plain rounding", UPSTREAM) if n in found)]
    used = {name: peak(name, vectors) for name in names}
    return [{"codec": name, "encode_peak": None if size is None else size / (vectors * 512)} for name, size in used.items()]


def _real(found: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    rows, attention = [], []
    upstream = found.get(UPSTREAM)
    for kind, count in (("flux", 10), ("sd3", 10), ("wan", 3)):
        mini = Mini(kind)
        mini.schedule("euler", 1.0)
        fit = kv.collect(mini, list(range(count)), seed=7, steps=20, every=3)
        test = kv.collect(mini, list(range(count)), seed=0, steps=20, every=5)
        flat = {n: torch.cat(x).transpose(0, 1).flatten(1, 2) for n, x in fit.items() if n[-1] in "kv"}
        shuffled = {n: x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:16384]] for n, x in flat.items()}
        file, verdict = calibrate(shuffled, 4, model=mini.pipe.transformer)
        codecs = {name: build("codec", f"{name}:bits=4") for name in ("turbo", "trellis")}
        errors: dict[str, list[float]] = {"turbo": [], "trellis": [], "klt": []}
        rates: dict[str, list[float]] = {"turbo": [], "trellis": [], "klt": []}
        kl: dict[str, list[float]] = {which: [] for which in ("turbo", "trellis", "klt", *(["upstream"] if upstream else []))}
        for name in shuffled:
            x = torch.cat(test[name]).transpose(0, 1).flatten(1, 2)  # [heads, n, d]
            made = file.of(name, x.shape[-1], len(x), 4, 0)
            coded: dict[str, Tensor] = {}
            for which, codec in codecs.items():
                packed = codec.encode(x)
                coded[which] = codec.decode(packed)
                rates[which].append(packed.nbytes * 8 / x.numel())
            packed = codecs["trellis"].encode(x, bases=made)
            coded["klt"] = codecs["trellis"].decode(packed, bases=made)
            rates["klt"].append(packed.nbytes * 8 / x.numel())
            for which in errors:
                errors[which].append(nmse(x, coded[which]))
            if name.endswith("k"):
                if upstream:
                    coded["upstream"] = upstream[1](upstream[0](x[None], 4))[0].float()
                for which in kl:
                    kl[which].append(_kl(test[name.replace("k", "q")], test[name], coded[which]))
        kept = [v["kept"] for heads in verdict.values() for v in heads]
        for which, many in errors.items():
            rows.append(
                {"mini": kind, "codec": which, "bits": sum(rates[which]) / len(many), "nmse": sum(many) / len(many), "worst": max(many)}
                | ({"kept": f"{kept.count('klt')} of {len(kept)}"} if which == "klt" else {})
            )
        for which, many in kl.items():
            attention.append({"mini": kind, "codec": which, "kl": sum(many) / len(many)})
    return rows, attention


def _kl(q: list[Tensor], k: list[Tensor], coded: Tensor) -> float:
    """Mean KL(exact || coded) of the attention weights, queries and keys before rotary positions."""
    total, n, at = 0.0, 0, 0
    for queries, keys in zip(q, k, strict=True):
        b, _, t, d = keys.shape
        near = coded[:, at : at + b * t].unflatten(1, (b, t)).transpose(0, 1)
        at += b * t
        exact = torch.log_softmax(queries @ keys.transpose(-1, -2) / d**0.5, -1)
        other = torch.log_softmax(queries @ near.transpose(-1, -2) / d**0.5, -1)
        total += float((exact.exp() * (exact - other)).sum(-1).mean())
        n += 1
    return total / max(n, 1)


PROMISED = {"trellis": (0.089, 0.0245, 0.0067), "turbo": (0.1165, 0.0342, 0.0094)}


def verdicts(result: dict[str, Any]) -> list[Row]:
    """The project's promises beside what was measured here."""
    out: list[Row] = []
    need = promises(out)
    for name, most in PROMISED.items():
        for bits, limit in zip((2, 3, 4), most, strict=True):
            row = next(r for r in result["rate"] if r["codec"] == name and r["d"] == 128 and int(r["bits"]) == bits)
            need(f"{name} NMSE at {row['bits']:.4f} bits, d=128", row["nmse"], most=limit)
    speed = {(r["codec"], r["bits"]): r for r in result["speed"]}
    if (UPSTREAM, 4) in speed:
        for name, at4, at2, back in (("turbo", 12, 6, 1.9), ("trellis", 2.5, 1, 1.5)):
            need(f"{name} encode / upstream, 4 bits", speed[name, 4]["encode_ratio"], least=at4)
            need(f"{name} encode / upstream, 2 bits", speed[name, 2]["encode_ratio"], least=at2)
            need(f"{name} decode to bf16 / upstream, 4 bits", speed[name, 4]["decode_ratio"], least=back)
            need(f"{name} decode to bf16 / upstream, 2 bits", speed[name, 2]["decode_ratio"], least=back)
    for row in result["memory"]:
        if row["codec"] in ("turbo", "trellis"):
            need(f"{row['codec']} encode, extra peak / input of 64 MiB", row["encode_peak"], most=0.35)
    for row in result["klt"]:
        if row["codec"] == "klt":
            need(f"{row['mini']}: per-head KLT on held-out keys and values, {row['bits']:.3f} bits", row["nmse"], most=0.0035)
    kl = {(r["mini"], r["codec"]): r["kl"] for r in result["attention"]}
    for mini in ("flux", "sd3", "wan"):
        if (mini, "upstream") in kl:
            need(f"{mini}: softmax KL at 4 bits, trellis / upstream", kl[mini, "trellis"] / kl[mini, "upstream"], most=0.75)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    rate = [
        [r["codec"], str(r["d"]), f"{r['bits']:.4f}", f"{r['nmse']:.6f}", f"{r['gap_db']:.2f}"] for r in result["rate"] if r["d"] == 128
    ]
    yield (
        "Gaussian directions, d = 128: all side information counted; gap to Shannon's 2^(-2R)",
        ["codec", "d", "bits", "NMSE", "gap dB"],
        rate,
    )
    speed = [
        [r["codec"], str(r["bits"]), f"{r['held_bits']:.3f}", f"{r['nmse']:.5f}", f"{r['encode']:.0f}", f"{r['decode']:.0f}"]
        for r in result["speed"]
    ]
    yield f"{result['vectors']} vectors, d = 128, MB/s of fp32, CPU time", ["codec", "bits", "held bits", "NMSE", "encode", "decode"], speed
    memory = [[r["codec"], "unknown" if r["encode_peak"] is None else f"{r['encode_peak']:.2f}"] for r in result["memory"]]
    yield "extra peak memory of encode, times the input of 64 MiB", ["codec", "peak"], memory
    klt = [[r["mini"], r["codec"], f"{r['bits']:.3f}", f"{r['nmse']:.6f}", f"{r['worst']:.6f}", r.get("kept", "")] for r in result["klt"]]
    yield (
        "keys and values of the minis, held-out trajectories",
        ["mini", "codec", "bits", "NMSE", "worst stream", "heads that kept KLT"],
        klt,
    )
    attention = [[r["mini"], r["codec"], f"{r['kl']:.2e}"] for r in result["attention"]]
    yield "attention weights with coded keys, 4 bits", ["mini", "codec", "KL"], attention
    yield from closing(result)


def plot(result: Row) -> str:
    """NMSE against bits with the Shannon line, as SVG."""
    chart = Chart(560, 330, 60, 14, lambda bits: (bits - 1) / 7.5, lambda e: 1 + math.log10(e) / 5.5)
    for e in range(6):
        chart.rule(10**-e, f"1e-{e}")
    for bits in range(1, 9):
        chart.tick(bits, str(bits))
    chart.line([(bits, 4**-bits) for bits in (1.0, 8.5)], "#999", "5 3")
    for i, (name, colour) in enumerate({"turbo": "#d2691e", "trellis": "#1f5fa8"}.items()):
        points = [(r["bits"], r["nmse"]) for r in result["rate"] if r["codec"] == name and r["d"] == 128]
        chart.line(points, colour)
        for bits, error in points:
            chart.dot(bits, error, colour)
        chart.legend(-120, i, name, colour)
    chart.legend(-120, 2, "Shannon, 2^(-2R)", "#777")
    return chart.svg("bits a coordinate, everything counted (d = 128)")
