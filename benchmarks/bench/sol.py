"""Sparse attention beside ComfyUI's own: ``sol_attn`` of comfy-kitchen (arXiv 2607.24027) in its eager form, on the trained minis' q, k, v.

Both read blocks of 64 keys for blocks of 64 queries, and both represent the other blocks in the same softmax. The peer chooses by the
dot products of centred block means, always reads the block itself and its two neighbours, and adds one pooled term a block. Ours
chooses by the mass of four mean queries, as many blocks for each head as the peer read, where they have the most of it. Both get the
tokens in the same order: as the model has them, and tile by tile, where that is another one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai_core.attention import block_attention
from tqai_core.attention.far_field import FAR
from tqai_core.attention.token_order import TileOrder
from tqai_core.metrics import nmse
from tqai_core.registry import build

from .harness import Mini, Row

BLOCK, DENSITY, STEPS = 64, 0.25, 6
MISSING = "comfy-kitchen 0.2.40 or newer is not installed (pip install --no-deps comfy-kitchen)"
SIDE = 64  # of pictures, in pixels of the mini


@dataclass(frozen=True)
class Clip:
    """Clips and pictures longer than the mini was trained for; ``frames`` as the pipeline counts them, 0 for pictures."""

    kind: str
    grid: tuple[int, ...]
    frames: int = 0
    text_first: bool = False


CLIPS = {
    "WAN, 21 frames": Clip("wan", (21, 8, 8), 81),
    "WAN, 31 frames": Clip("wan", (31, 8, 8), 121),
    "Flux, 64 x 64": Clip("flux", (32, 32), text_first=True),
    "photographs, 64 x 64": Clip("photo", (32, 32), text_first=True),
    "SD3, 64 x 64": Clip("sd3", (32, 32)),
}


def rows(tell: Callable[[str], None] = lambda text: None) -> list[Row]:
    """[] where the peer is not installed. Middle steps of one run of each clip."""
    if find_spec("comfy_kitchen") is None:
        return []
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "sol_attn"):
        return []
    out: list[Row] = []
    for name, clip in CLIPS.items():
        tell(f"sol_attn: {name}")
        found = _captured(clip)
        order = TileOrder.of(found[0][0].shape[2], BLOCK, clip.grid, clip.text_first)
        out += _compared({"clip": name, "order": "as it is"}, found)
        if not order.raster:
            tiled = [(order.apply(q, 2), order.apply(k, 2), order.apply(v, 2)) for q, k, v in found]
            out += _compared({"clip": name, "order": "tiles"}, tiled)
    return out


def _captured(clip: Clip) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The self-attentions of steps 3 and 4 of :data:`STEPS`."""
    from tqai_core.hosts.diffusers import minis

    from .attention import Capture

    mini = Mini(clip.kind)
    mini.schedule("euler", 1.0)
    if clip.kind == "sd3":
        _widen(mini.pipe.transformer, max(clip.grid))
    options: dict[str, Any] = {**minis.inputs(clip.kind, [3, 7], side=None if clip.frames else SIDE), "output_type": "latent"}
    if clip.frames:
        options["num_frames"] = clip.frames
    with Capture() as seen:
        mini.pipe(**options, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    each = len(seen.found) // STEPS
    return [(q.float(), k.float(), v.float()) for q, k, v in seen.found[2 * each : 4 * each]]


def _widen(model: Any, most: int) -> None:
    """SD3's table of places for up to ``most`` patches a side, as far apart as those it was trained with."""
    from diffusers.models.embeddings import PatchEmbed

    own, size = model.pos_embed, model.config.patch_size
    side = most * size * own.base_size // own.pos_embed_max_size
    wide = PatchEmbed(side, side, size, model.config.in_channels, model.inner_dim, pos_embed_max_size=most)
    own.pos_embed, own.pos_embed_max_size = wide.pos_embed, most


def _compared(about: Row, found: list[tuple[Tensor, Tensor, Tensor]]) -> list[Row]:
    errors: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    shares: list[float] = []
    for q, k, v in found:
        exact = F.scaled_dot_product_attention(q, k, v)
        read = routed(q, k)
        shares.append(float(read.float().mean()))
        chosen = most(build("scorer", "bsa").mass(q, k, BLOCK, BLOCK), int(read.sum()) // read[..., 0, 0].numel())
        ways: dict[str, Callable[[], Tensor]] = {"sol_attn": lambda q=q, k=k, v=v: sol(q, k, v)}  # type: ignore[misc]
        for far in (None, *FAR):
            ways[f"ours, {far or 'no'} far field"] = lambda x=(q, k, v, chosen), far=far: block_attention(*x, BLOCK, BLOCK, far=far)  # type: ignore[misc]
        for name, run in ways.items():
            run()
            began = time.process_time()
            out = run()
            times.setdefault(name, []).append(time.process_time() - began)
            errors.setdefault(name, []).append(nmse(out, exact))
    tokens, d = found[0][0].shape[2:]
    about |= {"tokens": tokens, "d": d, "density": mean(shares)}
    return [
        about | {"method": name, "nmse": mean(values), "worst": max(values), "seconds": median(times[name])}
        for name, values in errors.items()
    ]


def sol(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The function itself: its registry takes a width of 128 alone, that of its kernels."""
    peer: Any = sys.modules["comfy_kitchen.backends.eager.sol_attn"]
    out: Tensor = peer.sol_attn(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), topk_ratio=DENSITY)
    return out.transpose(1, 2)


def routed(q: Tensor, k: Tensor) -> Tensor:
    """Which blocks the peer reads, ``bool [b, h, n, n]``: by its own pooling and count."""
    peer: Any = sys.modules["comfy_kitchen.backends.eager.sol_attn"]
    n = -(-q.shape[2] // BLOCK)
    means = [peer._pool(x.transpose(1, 2), n, "mean").transpose(1, 2) for x in (q, k)]
    scores = means[0] @ (means[1] - means[1].mean(2, keepdim=True)).mT
    own = torch.arange(n)
    return (scores >= scores.topk(peer._topk_count(n, DENSITY), -1).values[..., -1:]) | ((own[:, None] - own).abs() <= 1)


def most(mass: Tensor, count: int) -> Tensor:
    """The ``count`` blocks of a head with the most ``mass [b, h, nq, nk]``, and of each row of queries its first: ``bool``."""
    best = mass.amax(-1, keepdim=True)
    others = mass.masked_fill(mass >= best, -1).flatten(2).topk(count - mass.shape[-2], -1).values[..., -1:, None]
    return (mass >= best) | (mass >= others)


def verdict(found: list[Row], need: Any) -> None:
    """Half of the peer's error at as many blocks was asked for."""
    for d in sorted({r["d"] for r in found}, reverse=True) or [128]:
        worst = max((r["ratio"] for r in ratios(found) if r["d"] == d), default=None)
        need(f"error over that of sol_attn, density {DENSITY:g}, as many blocks, head_dim {d}, worst clip", worst, most=0.5)


def ratios(found: list[Row]) -> list[Row]:
    """Of each clip and order the row of ours with the least error, with its ``ratio`` to the peer's."""
    peers = {(r["clip"], r["order"]): r["nmse"] for r in found if r["method"] == "sol_attn"}
    ours = [
        min((r for r in found if (r["clip"], r["order"]) == key and r["method"] != "sol_attn"), key=lambda r: r["nmse"]) for key in peers
    ]
    return [r | {"ratio": r["nmse"] / peers[r["clip"], r["order"]]} for r in ours]


def cells(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["mini", "order of tokens", "tokens, D", "blocks read", "method", "NMSE e-4", "worst layer", "over sol_attn's", "CPU ms"]
    peers = {(r["clip"], r["order"]): r["nmse"] for r in found if r["method"] == "sol_attn"}
    return head, [
        [
            r["clip"], r["order"], f"{r['tokens']}, {r['d']}", f"{r['density']:.0%}", r["method"], f"{r['nmse'] * 1e4:.1f}",
            f"{r['worst'] * 1e4:.1f}", f"{r['nmse'] / peers[r['clip'], r['order']]:.2f}", f"{r['seconds'] * 1e3:.1f}",
        ]
        for r in sorted(found, key=lambda r: (list(CLIPS).index(r["clip"]), r["order"], -r["nmse"]))
    ]  # fmt: skip
