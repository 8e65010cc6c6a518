"""Sparse attention beside ComfyUI's own: ``sol_attn`` of comfy-kitchen (arXiv 2607.24027) in its eager form, on the trained minis' q, k, v.

Both read blocks of 64 keys for blocks of 64 queries, and both represent the other blocks in the same softmax. The peer chooses by the
dot products of centred block means, always reads the block itself and its two neighbours, and adds one pooled term a block. Ours
chooses by the mass of four mean queries, as many blocks for each head as the peer read, where they have the most of it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai_core.attention import block_attention
from tqai_core.attention.far_field import FAR
from tqai_core.metrics import nmse
from tqai_core.registry import build

from .harness import Mini, Row

BLOCK, DENSITY, STEPS = 64, 0.25, 6
MISSING = "comfy-kitchen 0.2.40 or newer is not installed (pip install --no-deps comfy-kitchen)"
FRAMES = {"21 frames": 81, "31 frames": 121}  # of WAN's clips: as the pipeline counts them


def rows() -> list[Row]:
    """[] where the peer is not installed. Middle steps of one run of WAN's mini, longer than it was trained for; D = 128."""
    if find_spec("comfy_kitchen") is None:
        return []
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "sol_attn"):
        return []
    return [row for what, frames in FRAMES.items() for row in _compared(what, _captured(frames))]


def _captured(frames: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The self-attentions of steps 3 and 4 of :data:`STEPS`."""
    from tqai_core.hosts.diffusers import minis

    from .attention import Capture

    mini = Mini("wan")
    mini.schedule("euler", 1.0)
    options: dict[str, Any] = {**minis.inputs("wan", [3, 7]), "num_frames": frames, "output_type": "latent"}
    with Capture() as seen:
        mini.pipe(**options, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    each = len(seen.found) // STEPS
    return [(q.float(), k.float(), v.float()) for q, k, v in seen.found[2 * each : 4 * each]]


def _compared(what: str, found: list[tuple[Tensor, Tensor, Tensor]]) -> list[Row]:
    errors: dict[str, list[float]] = {}
    shares: list[float] = []
    for q, k, v in found:
        exact = F.scaled_dot_product_attention(q, k, v)
        read = routed(q, k)
        shares.append(float(read.float().mean()))
        chosen = most(build("scorer", "bsa").mass(q, k, BLOCK, BLOCK), int(read.sum()) // read[..., 0, 0].numel())
        ways = {f"ours, {far or 'no'} far field": block_attention(q, k, v, chosen, BLOCK, BLOCK, far=far) for far in (None, *FAR)}
        for name, out in {"sol_attn": sol(q, k, v), **ways}.items():
            errors.setdefault(name, []).append(nmse(out, exact))
    tokens, d = found[0][0].shape[2:]
    about = {"clip": what, "tokens": tokens, "d": d, "density": mean(shares)}
    return [about | {"method": name, "nmse": mean(values), "worst": max(values)} for name, values in errors.items()]


def sol(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import comfy_kitchen

    out: Tensor = comfy_kitchen.sol_attn(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), topk_ratio=DENSITY)
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
    ratios = [least / peer for least, peer in _pairs(found)]
    need(f"error over that of sol_attn, density {DENSITY:g}, as many blocks, worst clip", max(ratios, default=None), most=0.5)


def _pairs(found: list[Row]) -> list[tuple[float, float]]:
    clips = dict.fromkeys(r["clip"] for r in found)
    of = lambda clip, ours: min(r["nmse"] for r in found if r["clip"] == clip and r["method"].startswith("ours") == ours)  # noqa: E731
    return [(of(clip, True), of(clip, False)) for clip in clips]


def cells(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["clip of WAN's mini", "tokens, D", "blocks read", "method", "NMSE e-4", "worst layer"]
    return head, [
        [r["clip"], f"{r['tokens']}, {r['d']}", f"{r['density']:.0%}", r["method"], f"{r['nmse'] * 1e4:.1f}", f"{r['worst'] * 1e4:.1f}"]
        for r in sorted(found, key=lambda r: (r["clip"], -r["nmse"]))
    ]
