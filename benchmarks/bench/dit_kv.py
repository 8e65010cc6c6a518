"""``tqai bench dit_kv``: the cache of reference pictures of a diffusion transformer, packed, beside other ways to hold it in fewer bits.

Quality is that of the edit mini (:mod:`minis.edit`), diffusers' own FLUX.2 class with the attention of Klein-KV, trained to redraw a
reference picture changed: four references of 64 tokens, two heads of 64. Each seed is another picture and another noise; PSNR is to the
picture that the exact cache gives. "Outliers" is the same function with four key channels of each head 125 times as large and those of
the queries as much smaller. Bytes, memory and time: :mod:`dit_kv_cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from minis import edit
from torch import Tensor

import tqai_core as tqai
from tqai_core.codecs import packing
from tqai_core.codecs.rotation import matrix
from tqai_core.metrics import psnr
from tqai_core.types import nbytes

from .dit_kv_cost import layers, memory, smaller, speed
from .harness import Row, Table, closing, machine, one_thread, promises

STEPS, SEEDS = (4, 8, 24), tuple(range(32))
PROMISED = (8, 24)  # steps
OURS = {
    **{f"tqai {bits} (inputs of {2 * bits} bits)": f"turbo:bits={bits}" for bits in (4, 3, 2)},
    **{f"tqai k{k}v{v}": f"turbo:bits_k={k},bits_v={v}" for k, v in ((8, 8), (8, 4), (6, 4), (4, 4), (3, 3), (2, 2))},
}
BEST = next(iter(OURS))
EXACT, NONE = "exact", "no reference"
INT8, ROTATED = "int8, groups of 64", "rotated int4, groups of 256"
VARIANTS = ("plain", "outliers")
FEW = 0.05  # quantile


def bench(pictures: Sequence[int] = SEEDS, steps: Sequence[int] = STEPS, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``pictures``: their seeds; ``tell`` hears of progress."""
    one_thread()
    rows: list[Row] = []
    for variant in VARIANTS:
        for count in steps:
            tell(f"{variant}, {count} steps")
            rows += quality(pictures, variant, count)
    tell("bytes, memory and time of a step")
    result = {
        "bench": "dit_kv", "machine": machine(), "steps": list(steps), "seeds": list(pictures), "rows": rows, "bytes": smaller(),
        "memory": memory(), "speed": speed(),
    }  # fmt: skip
    return result | {"verdicts": verdicts(result)}


@dataclass(frozen=True)
class Scaled:
    """Integers with an fp16 scale for each group of channels, symmetric about zero; ``rotated`` by a random Hadamard matrix first."""

    bits: int
    group: int
    rotated: bool = False

    def hold(self, x: Tensor) -> tuple[Tensor, int]:
        """What is read back of ``x``, and the bytes that were held."""
        y, turn = x.reshape(-1, self.group), matrix(self.group, 0)
        y = y @ turn.T if self.rotated else y
        most = 2 ** (self.bits - 1) - 1
        scale = (y.abs().amax(-1, keepdim=True) / most).clamp_min(1e-7).half()
        codes = (y / scale).round().clamp(-most, most)
        unsigned = (codes + most).to(torch.uint8)
        held = [unsigned if self.bits == 8 else packing.pack(unsigned, self.bits), scale]
        y = codes * scale
        return (y @ turn if self.rotated else y).view(x.shape), nbytes(held)


PEERS = {
    INT8: Scaled(8, 64), "int4, groups of 64": Scaled(4, 64), ROTATED: Scaled(4, 256, rotated=True),
    "int2, groups of 64": Scaled(2, 64), "rotated int4, a head": Scaled(4, 64, rotated=True),
}  # fmt: skip


def quality(seeds: Sequence[int], variant: str, steps: int, methods: Iterable[str] = (*OURS, *PEERS, NONE)) -> list[Row]:
    """A row for the exact cache and for each of ``methods``."""
    net = edit.load()
    if variant == "outliers":
        net.fold()
    drawn = [edit.batch(len(edit.TASKS), edit.VIEWS, True, torch.Generator().manual_seed(seed)) for seed in seeds]
    at = [seed % len(edit.TASKS) for seed in seeds]
    references, task, wanted = (torch.stack([batch[i][own] for batch, own in zip(drawn, at, strict=True)]) for i in range(3))
    run = lambda change=lambda cache: None: edit.sample(net, references, task, steps, seeds[0], change)  # noqa: E731
    each = lambda x, other: sorted(psnr(*pair) for pair in zip(x, other, strict=True))  # noqa: E731
    exact = run()
    rows = [{"variant": variant, "steps": steps, "method": EXACT, "bits": 16.0, "right": median(each(exact, wanted))}]
    for method in methods:
        x, bits = _through(method, net, run)
        found = each(x, exact)
        rows.append({
            "variant": variant, "steps": steps, "method": method, "bits": bits, "psnr": median(found), "few": found[int(FEW * len(found))],
            "least": found[0], "right": median(each(x, wanted)),
        })  # fmt: skip
    return rows


def _through(method: str, net: edit.Edit, run: Callable[..., Tensor]) -> tuple[Tensor, float]:
    """Pictures whose cache is held by ``method``, and the bits held a number."""
    if method in OURS:
        with tqai.apply(net.transformer, tqai.Config(level="kv", codec=OURS[method], sink=0)) as handle:
            x, report = run(), handle.report()
            return x, 16 * report.bytes_held_peak / report.bytes_exact
    if method == NONE:
        return run(forget), 0.0
    held = exact = 0

    def change(cache: Any) -> None:
        nonlocal held, exact
        for layer in layers(cache):
            pair = layer.get()
            found = [PEERS[method].hold(x) for x in pair]
            layer.store(*(x for x, _ in found))
            held, exact = held + sum(size for _, size in found), exact + sum(x.numel() for x in pair)

    x = run(change)
    return x, 8 * held / exact


def forget(cache: Any) -> None:
    for layer in layers(cache):
        layer.store(*(x[:, :0] for x in layer.get()))


def verdicts(result: Row) -> list[Row]:
    """What the packed cache promises."""
    at = {(r["variant"], r["steps"], r["method"]): r for r in result["rows"]}
    out: list[Row] = []
    need = promises(out)
    for steps in [steps for steps in PROMISED if steps in result["steps"]]:
        of = lambda variant, method, steps=steps: at[variant, steps, method]["psnr"]  # noqa: E731
        ours = [of(variant, BEST) for variant in VARIANTS]
        need(f"{steps} steps, 4 bits: dB below int8 in groups of 64", of("plain", INT8) - ours[0], most=1.0)
        for variant, own in zip(VARIANTS, ours, strict=True):
            need(f"{steps} steps, 4 bits: dB above rotated int4 in groups of 256, {variant}", own - of(variant, ROTATED), least=6.0)
        need(f"{steps} steps, 4 bits: dB lost with outlier channels", ours[0] - ours[1], most=1.0)
    need("4 bits: bits held a number", max(at[variant, steps, BEST]["bits"] for variant, steps, name in at if name == BEST), most=4.3)
    for row in result["bytes"]:
        need(f"{row['method']}: times smaller than bf16, head dimension {row['dim']}", row["ratio"], least={64: 3.6, 128: 3.8}[row["dim"]])
    for row in result["memory"]:
        what = f"{row['method']}, {row['way']}: a step at {row['tokens']:,} tokens beside what is held"
        if row["way"] == "in place":
            need(f"{what}, MiB", row["mib"], most=2.0)
        else:
            need(f"{what}, layers", row["layers"], most=2.0)
    for row in result["speed"]:
        most = 1.0 if row["way"] == "in place" and row["method"] != "tqai 4" else 1.3
        need(f"{row['method']}, {row['way']}: time of a step at {row['tokens']:,} tokens, of the dense cache's", row["ratio"], most=most)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    """The tables of the result: what loses to a peer of no more bits stands first."""
    at = {(r["variant"], r["steps"], r["method"]): r for r in result["rows"]}
    names = [name for name in dict.fromkeys(r["method"] for r in result["rows"]) if name != EXACT]
    last = max(result["steps"], key=lambda steps: sum(r["steps"] == steps for r in result["rows"]))  # where all were measured
    loses = lambda name: name in OURS and any(  # noqa: E731
        peer not in OURS and 0 < at["plain", last, peer]["bits"] <= at["plain", last, name]["bits"]
        and at["plain", last, peer]["psnr"] > at["plain", last, name]["psnr"] for peer in names
    )  # fmt: skip
    names.sort(key=lambda name: (not loses(name), -at["plain", last, name]["psnr"]))
    bits = lambda name: f"{at['plain', last, name]['bits']:.2f}" if at["plain", last, name]["bits"] else ""  # noqa: E731
    cell = lambda r: f"{r['psnr']:.1f} / {r['few']:.1f} / {r['least']:.1f}" if r else ""  # noqa: E731
    for variant, title in zip(VARIANTS, ("quality", "quality with outlier channels"), strict=True):
        rows = [[name, bits(name), *(cell(at.get((variant, steps, name))) for steps in result["steps"])] for name in names]
        yield title, ["cache", "bits held a number", *(f"{steps} steps" for steps in result["steps"])], rows
    right = [[name, *(f"{at['plain', steps, name]['right']:.1f}" for steps in result["steps"])] for name in (EXACT, BEST, ROTATED, NONE)]
    yield "PSNR dB to the picture that is asked for, median", ["cache", *(f"{steps} steps" for steps in result["steps"])], right
    speed = [[r["method"], r["way"], f"{r['tokens']:,}", f"{r['ratio']:.2f}"] for r in result["speed"]]
    yield "speed", ["cache", "read", "reference tokens", "time of a step / dense"], speed
    memory = [[r["method"], r["way"], f"{r['tokens']:,}", f"{r['mib']:.2f}", f"{r['layers']:.2f}"] for r in result["memory"]]
    yield "memory of a step beside what is held", ["cache", "read", "reference tokens", "MiB", "layers of dense keys and values"], memory
    smaller = [[r["method"], f"{r['dim']}", f"{r['tokens']:,}", f"{r['ratio']:.2f}"] for r in result["bytes"]]
    yield "bytes at 4 and 4 bits", ["cache", "head dimension", "tokens", "times smaller than bf16"], smaller
    yield from closing(result)
