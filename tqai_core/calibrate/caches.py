"""What a file of ``tqai calibrate`` has for packed caches: bits by layer for keys and values, and matrices that shape their errors.

The damage of a width is predicted as in :mod:`calibrate.fisher`, with the errors of cache rows in place of a codec's. The matrices come
from the second moments of rows, queries and gradients (:mod:`codecs.shaped`). Both must win on windows that nothing was fitted on, where
every key and value behind the sinks is read coded, so that the verdict is of the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import BITS, Rows, rows
from ..codecs.shaped import Shaped, shapes
from ..hosts.calibration_targets import Language
from ..kv.calibrated import share_out
from ..kv.statistics import KeyStatistics
from .cache_tables import DAMAGE, SHAPES

AVERAGES = (3.0, 4.0)  # whose allocations are tried
SHARES = (0.0, 0.5, 1.0)  # of the differences between layers
MARGIN = 0.97  # of the other's loss, for a choice to be kept
MORE = range(108, 116)  # windows for moments alone, at positions from the first to the last: rotary positions turn keys and queries
FAR = 0.43  # of the positions: where every second window of a verdict begins
SINK = 4  # first tokens that stay exact in a trial, as in a cache


class CacheSums:
    """Running sums by layer, of moments and of the damage of cache rows. ``sums`` is what a stopped run goes on from."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        self.sums[name] = self.sums[name] + x.cpu() if name in self.sums else x.cpu()

    def see(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of keys about their mean, of the queries of each kv head, and of values."""
        q = q.detach().float().unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        for name, x in (("q", q), ("k", _centred(k)), ("v", v.detach().float())):
            self.add(f"{layer}/{name}", (x.mT @ x).sum(0))
        return k, v

    def contract(self, layer: int, which: int, x: Tensor, grad: Tensor, scale: Tensor | None) -> None:
        """Keys or values ``x [B, H, n, d]`` of one probe and their gradient."""
        name, x = "kv"[which], x.detach().float()
        self.add(f"{layer}/g{name}", (grad.mT @ grad).sum(0))
        centre = x[:, :, SINK:].mean(2, keepdim=True) if which == 0 else torch.zeros(())
        scale = torch.ones(()) if scale is None else scale
        y = ((x - centre) / scale)[:, :, SINK:]
        damage = []
        for bits in BITS:
            coder = rows(x.shape[-1], bits, which, x.device)
            gap = (coder.decode(*coder.encode(y)) - y) * scale * grad[:, :, SINK:]
            damage.append(gap.sum((1, 2, 3)).square().sum())
        self.add(f"{layer}/damage{which}", torch.stack(damage).double())

    @property
    def layers(self) -> int:
        return sum(name.endswith("/q") for name in self.sums)

    def damage(self, samples: float) -> Tensor:
        """``fp32 [layers, 2, 6]``, means of a sample."""
        table = [[self.sums[f"{layer}/damage{which}"] for which in (0, 1)] for layer in range(self.layers)]
        return torch.stack([torch.stack(pair) for pair in table]).div(max(samples, 1)).float()

    def shapes(self) -> tuple[Tensor, Tensor]:
        """Matrices of keys, for errors that queries see, and of values, for errors that the output sees: ``fp16 [layers, H, d, d]``."""

        def stacked(rows: str, cost: str, shrink: float) -> Tensor:
            return torch.stack([shapes(self.sums[f"{i}/{rows}"], self.sums[f"{i}/{cost}"], shrink) for i in range(self.layers)]).half()

        return stacked("k", "q", 0.05), stacked("v", "gv", 0.5)  # gradients are few and far from Gaussian


def key_scale(q: Tensor, k: Tensor) -> Tensor:
    """The scale that a cache would give these keys."""
    found = KeyStatistics()
    found.observe(q.detach().float(), k.shape[1])
    found.take(k.detach().float())
    scale: Tensor = found.scale
    return scale


def _centred(k: Tensor) -> Tensor:
    k = k.detach().float()
    return k - k.mean(2, keepdim=True)


Bits = Sequence[tuple[int, int]]


def coded(bits: Bits, matrices: tuple[Tensor | None, Tensor | None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """For :func:`hosts.attention_interceptor.intercept_attention`: all keys and values behind the sinks as a cache would hold them."""

    def change(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape_k, shape_v = (None if x is None else x[layer].float() for x in matrices)
        found = KeyStatistics()
        if shape_k is None:
            found.observe(q.float(), k.shape[1])
        found.take(k[:, :, SINK:].float())
        pairs = []
        for which, (x, shape) in enumerate(((found.stored(k.float()), shape_k), (v.float(), shape_v))):
            coder: Rows = rows(x.shape[-1], bits[layer][which], which, x.device)
            coder = coder if shape is None else Shaped(coder, shape.to(x.device))
            pairs.append(coder.decode(*coder.encode(x)))
        out = found.restored(pairs[0]).to(k.dtype), pairs[1].to(v.dtype)
        return tuple(torch.cat([x[:, :, :SINK], own[:, :, SINK:]], 2) for x, own in zip((k, v), out, strict=True))  # type: ignore[return-value]

    return change


def shrunk(damage: Tensor, share: float) -> Tensor:
    """``damage [layers, 2, 6]`` with layers drawn together on a log scale: a few probes tell keys from values well, but one layer from
    another with much noise. ``share`` of their differences is left; 0 makes all layers alike."""
    log = damage.clamp_min(1e-30).log()
    mean = log.mean(0, keepdim=True)
    return (mean + share * (log - mean)).exp()


def tables(
    target: Language, sums: CacheSums, samples: float, choice: Sequence[int], seeds: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file and the verdict on ``seeds``; how far layers are drawn together is chosen on the seeds ``choice``."""
    for i, seed in enumerate(MORE):
        target.far(seed, i / (len(MORE) - 1), sums.see)
    damage, (keys, values) = sums.damage(samples), sums.shapes()
    where = {seed: i % 2 * FAR for i, seed in enumerate((*choice, *seeds), start=1)}  # positions that moments were not taken at, too
    exact = {seed: target.far(seed, part) for seed, part in where.items()}

    def loss(bits: Bits, matrices: tuple[Tensor | None, Tensor | None], seeds: Sequence[int] = seeds) -> float:
        runs = [
            target.damage(target.far(seed, where[seed], coded(bits, matrices)), exact[seed]) / target.size(exact[seed]) for seed in seeds
        ]
        return sum(runs) / len(runs)

    even: Bits = [(4, 4)] * len(damage)
    plain, shaped_k = loss(even, (None, None)), loss(even, (keys, None))
    kept_k = keys if shaped_k <= MARGIN * plain else None
    before = plain if kept_k is None else shaped_k
    shaped_v = loss(even, (kept_k, values))
    kept_v = values if shaped_v <= MARGIN * before else None
    tried = {share: loss(share_out(shrunk(damage, share), 4.0), (kept_k, kept_v), choice) for share in SHARES}
    damage = shrunk(damage, share := min(tried, key=tried.__getitem__))
    uniform = {4.0: before if kept_v is None else shaped_v}
    trials = []
    for average in AVERAGES:
        plainly = uniform.get(average) or loss([(int(average), int(average))] * len(damage), (kept_k, kept_v))
        shared = loss(share_out(damage, average), (kept_k, kept_v))
        kept_bits = "shared" if shared <= MARGIN * plainly else "uniform"
        trials.append({"average": average, "shared": shared, "uniform": plainly, "kept": kept_bits})
    kept = {name: x for name, x in zip(SHAPES, (kept_k, kept_v), strict=True) if x is not None}
    verdict = {
        "seeds": list(seeds), "bits": trials, "plain": plain, "shaped_k": shaped_k, "shaped_v": shaped_v,
        "kept": [name[-1] for name in kept], "share": share,
    }  # fmt: skip
    return {DAMAGE: damage, **kept}, verdict
