"""``tqai bench dit_kv``: the cache of reference pictures of a diffusion transformer, packed, beside other ways to hold it in fewer bits.

The transformer is diffusers' own FLUX.2 class with the attention of Klein-KV, two heads of 128, with random weights; values are made
larger, so that the output heeds the reference. Each seed is another model and another picture. "Outliers" is the same function with
four key channels 125 times as large and those of the queries as much smaller. Times are CPU time of one cached step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tqai_core as tqai
from tqai_core.codecs import packing
from tqai_core.codecs.rotation import matrix
from tqai_core.kv.prefix import Prefix, energy
from tqai_core.kv.segments import Plan
from tqai_core.metrics import psnr
from tqai_core.types import nbytes

from .harness import Row, Table, closing, machine, medians, one_thread, promises

STEPS, SEEDS, TEXT, SIDE = 8, (0, 1, 2), 16, 16  # SIDE: of the picture in tokens
REFERENCE = 32  # side of the reference in tokens
LONG = 64  # the same where time is measured
BITS = ((8, 8), (8, 4), (6, 4), (4, 4), (3, 3), (2, 2))
TIMED = ((8, 4), (4, 4))
OUTLIERS, FACTOR = [6, 7, 40, 41], 125.0
AMPLIFIED = 12.0
VARIANTS = ("plain", "outliers")
INT8, ROTATED = "int8, groups of 64", "rotated int4, groups of 256"


def bench(seeds: Sequence[int] = SEEDS, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress."""
    one_thread()
    rows: list[Row] = []
    for seed in seeds:
        for variant in VARIANTS:
            tell(f"seed {seed}, {variant}")
            rows += _quality(seed, variant)
    names = dict.fromkeys((r["variant"], r["method"]) for r in rows)
    rows = [medians([r for r in rows if (r["variant"], r["method"]) == name]) for name in names]
    tell("time of a step")
    result = {
        "bench": "dit_kv",
        "machine": machine(),
        "steps": STEPS,
        "seeds": list(seeds),
        "rows": rows,
        "bytes": _bytes(),
        "speed": _speed(),
    }
    return result | {"verdicts": verdicts(result)}


class Model:
    """A transformer, its inputs, and the loop of a pipeline that keeps the reference's keys and values."""

    def __init__(self, seed: int, reference: int, side: int = SIDE, layers: tuple[int, int] = (2, 4)) -> None:
        from diffusers import Flux2Transformer2DModel
        from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

        torch.manual_seed(seed)
        self.net = Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=layers[0], num_single_layers=layers[1], attention_head_dim=128, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(32,) * 4, guidance_embeds=False,
        ).eval().requires_grad_(False)  # fmt: skip
        for block in self.net.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
            block.attn.to_v.weight.mul_(AMPLIFIED)
        for block in self.net.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
            inner = block.attn.inner_dim
            block.attn.to_qkv_mlp_proj.weight[2 * inner : 3 * inner] *= AMPLIFIED
        self.noise, self.picture = torch.randn(1, side**2, 16), torch.randn(1, reference**2, 16)
        ids = [_grid(0, TEXT, 1), _grid(10, reference, reference), _grid(0, side, side)]
        self.given = dict(encoder_hidden_states=torch.randn(1, TEXT, 32), txt_ids=ids[0], return_dict=False)
        self.ids = ids[2], torch.cat(ids[1:])

    def fold(self) -> None:
        """Outlier channels in the keys; queries take them back."""
        for name, module in self.net.named_modules():
            if name.endswith(("norm_k", "norm_added_k")):
                module.weight[OUTLIERS] *= FACTOR
            elif name.endswith(("norm_q", "norm_added_q")):
                module.weight[OUTLIERS] /= FACTOR

    @torch.no_grad()
    def begin(self) -> tuple[Tensor, Any]:
        """The velocity of the first step, and the cache."""
        x, count = torch.cat([self.picture, self.noise], 1), self.picture.shape[1]
        return self.net(x, timestep=torch.ones(1), img_ids=self.ids[1], kv_cache_mode="extract", num_ref_tokens=count, **self.given)

    @torch.no_grad()
    def step(self, x: Tensor, sigma: float, cache: Any) -> Tensor:
        time = torch.full((1,), sigma)
        return self.net(x, timestep=time, img_ids=self.ids[0], kv_cache=cache, kv_cache_mode="cached", **self.given)[0]

    def run(self, change: Callable[[Any], None] = lambda cache: None) -> Tensor:
        """The latent after all steps; ``change`` may replace what the cache holds."""
        v, cache = self.begin()
        change(cache)
        x = self.noise - v / STEPS
        for i in range(1, STEPS):
            x = x - self.step(x, 1 - i / STEPS, cache) / STEPS
        return x


def _grid(frame: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(*(torch.tensor(x).float() for x in ([frame], range(height), range(width), [0])))


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
    "rotated int4, a head": Scaled(4, 128, rotated=True),
}  # fmt: skip


def _quality(seed: int, variant: str) -> list[Row]:
    model = Model(seed, REFERENCE)
    if variant == "outliers":
        model.fold()
    exact, rows = model.run(), []

    def row(method: str, x: Tensor, held: int, exact_bytes: int) -> None:
        rows.append({"variant": variant, "method": method, "bits": 16 * held / exact_bytes, "psnr": psnr(x, exact)})

    for bits_k, bits_v in BITS:
        config = tqai.Config(level="kv", codec=f"turbo:bits_k={bits_k},bits_v={bits_v}")
        with tqai.apply(model.net, config) as handle:
            x, report = model.run(), handle.report()
            row(f"tqai k{bits_k}v{bits_v}", x, report.bytes_held_peak, report.bytes_exact)
    for name, peer in PEERS.items():
        held = [0, 0]

        def change(cache: Any, peer: Scaled = peer, held: list[int] = held) -> None:
            for layer in cache.double_block_caches + cache.single_block_caches:
                pair = layer.get()
                found = [peer.hold(x) for x in pair]
                layer.store(*(x for x, _ in found))
                held[0] += sum(size for _, size in found)
                held[1] += sum(2 * x.numel() for x in pair)

        row(name, model.run(change), *held)
    row("no reference", model.run(_forget), 0, 1)
    return rows


def _forget(cache: Any) -> None:
    for layer in cache.double_block_caches + cache.single_block_caches:
        layer.store(*(x[:, :0] for x in layer.get()))


def _bytes() -> list[Row]:
    """How much smaller than bf16 a layer of a bf16 model is held, everything counted."""
    rows = []
    for d in (64, 128):
        k, v = (torch.randn(1, REFERENCE**2, 2, d).bfloat16() for _ in range(2))
        held = Prefix.pack(k, v, Plan(recent=0), energy(k, 2)).nbytes
        rows.append({"dim": d, "tokens": REFERENCE**2, "ratio": nbytes([k, v]) / held})
    return rows


def _speed() -> list[Row]:
    """CPU time of a cached step beside the dense cache of a model of its own, interleaved."""
    plain, model = (Model(0, LONG, side=REFERENCE, layers=(1, 1)) for _ in range(2))
    rows: list[Row] = []
    dense = plain.begin()[1]
    for bits_k, bits_v in TIMED:
        with tqai.apply(model.net, tqai.Config(level="kv", codec=f"turbo:bits_k={bits_k},bits_v={bits_v}")) as handle:
            packed = model.begin()[1]
            times: dict[str, list[float]] = {"dense": [], "packed": []}
            for _ in range(5):
                for name, net, cache in (("packed", model, packed), ("dense", plain, dense)):
                    start = time.process_time()
                    net.step(net.noise, 0.5, cache)
                    times[name].append(time.process_time() - start)
            assert handle.report().per_site["attn.0"]["materialised"] == 5
            assert "Packed" not in type(dense.get_double(0)).__name__
        rows.append({"method": f"tqai k{bits_k}v{bits_v}", "tokens": LONG**2, "ratio": median(times["packed"]) / median(times["dense"])})
    return rows


def verdicts(result: Row) -> list[Row]:
    """What the packed cache promises."""
    at = {(r["variant"], r["method"]): r for r in result["rows"]}
    out: list[Row] = []
    need = promises(out)
    plain, outliers = (at[variant, "tqai k4v4"] for variant in VARIANTS)
    for row in result["bytes"]:
        need(f"k4v4: times smaller than bf16, head dimension {row['dim']}", row["ratio"], least={64: 3.6, 128: 3.8}[row["dim"]])
    need("k4v4: dB below int8 in groups of 64", at["plain", INT8]["psnr"] - plain["psnr"], most=1.0)
    need("k4v4: dB above rotated int4 in groups of 256, plain", plain["psnr"] - at["plain", ROTATED]["psnr"], least=6.0)
    need("k4v4: dB above rotated int4 in groups of 256, outliers", outliers["psnr"] - at["outliers", ROTATED]["psnr"], least=6.0)
    need("k4v4: dB lost with outlier channels", plain["psnr"] - outliers["psnr"], most=1.0)
    for row in result["speed"]:
        need(f"{row['method']}: time of a step at {row['tokens']:,} tokens, of the dense cache's", row["ratio"], most=1.3)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    """The tables of the result."""
    at = {(r["variant"], r["method"]): r for r in result["rows"]}
    names = sorted(dict.fromkeys(r["method"] for r in result["rows"]), key=lambda name: -at["plain", name]["bits"])
    rows = [
        [name, f"{at['plain', name]['bits']:.2f}" if at["plain", name]["bits"] else "", *(f"{at[v, name]['psnr']:.1f}" for v in VARIANTS)]
        for name in names
    ]
    yield "quality", ["cache", "bits held a number", "PSNR dB", "with outlier channels"], rows
    speed = [[r["method"], f"{r['tokens']:,}", f"{r['ratio']:.2f}"] for r in result["speed"]]
    yield "speed", ["cache", "reference tokens", "time of a step / dense"], speed
    smaller = [[f"{r['dim']}", f"{r['tokens']:,}", f"{r['ratio']:.2f}"] for r in result["bytes"]]
    yield "bytes at 4 and 4 bits", ["head dimension", "tokens", "times smaller than bf16"], smaller
    yield from closing(result)
