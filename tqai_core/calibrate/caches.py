"""What a file of ``tqai calibrate`` has for packed caches: bits by layer for keys and values, and matrices that shape the errors of keys.

The damage of a width is measured: the keys, or the values, of one layer alone are coded as a cache would, and what the model says of the
last tokens of long texts is compared with what the exact one says. Layers differ by a factor of a hundred and more, which random
probes of gradients do not tell from their own noise at so few passes; damages of single layers add up. The last tokens are read as they
are, as in a cache: layers that look nowhere else lose nothing. The matrices come from the second moments of keys and queries
(:mod:`codecs.shaped`). Both must win on texts that nothing was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import Rows, rows
from ..codecs.shaped import Shaped, shapes
from ..hosts.calibration_targets import Language, Reading
from ..kv.calibrated import share_out
from ..kv.statistics import KeyStatistics
from .cache_tables import DAMAGE, METRIC, SHAPES

AVERAGES = (3.0, 4.0)  # whose allocations are tried
MARGIN = 0.97  # of the other's loss, for a choice to be kept
MORE = range(108, 116)  # windows for moments, at positions from the first to the last: rotary positions turn keys and queries
ALONE, JUDGED = range(116, 121), range(121, 124)  # texts on which layers are coded one at a time, and those of the verdict
LENGTH, LAST = 1536, 32  # tokens of a text, and those of its end that are judged and never coded
EVEN = 0.15  # of the mean damage: what any layer is taken to lose at least, for caches without recent tokens, where all layers look back
WIDTH, NEARBY = 4, (3, 4, 5)  # bits of a layer that is coded alone, and of all keys or values together
FAR = 0.43  # of the positions: where every second text of a verdict begins
SINK = 4  # first tokens that stay exact in a trial, as in a cache
Bits = Mapping[int, tuple[int, int]]  # of keys and values by layer; 0: left as they are
Matrices = tuple[Tensor, Tensor] | None  # of the keys of all layers: shapes and metrics


class Moments:
    """Running sums by layer of keys about their mean and of the queries of each kv head."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], Tensor] = {}

    def see(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, keys = q.detach().float().unflatten(1, (k.shape[1], -1)).flatten(2, 3), k.detach().float()
        for name, x in (("q", q), ("k", keys - keys.mean(2, keepdim=True))):
            found = (x.mT @ x).sum(0).cpu()
            self.sums[layer, name] = self.sums[layer, name] + found if (layer, name) in self.sums else found
        return k, v

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``fp16 [layers, H, d, d]`` both."""
        pairs = [shapes(self.sums[i, "k"], self.sums[i, "q"]) for i in range(len(self.sums) // 2)]
        shape, metric = (torch.stack(part).half() for part in zip(*pairs, strict=True))
        return shape, metric


def coded(bits: Bits, matrices: Matrices) -> Callable[..., tuple[Tensor, Tensor]]:
    """For :func:`hosts.attention_interceptor.intercept_attention`: keys and values between the sinks and the last tokens as a cache would
    hold them."""

    def put(x: Tensor, own: Tensor) -> Tensor:
        return torch.cat([x[:, :, :SINK], own[:, :, SINK:-LAST].to(x.dtype), x[:, :, -LAST:]], 2)

    def change(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bits_k, bits_v = bits.get(layer, (0, 0))
        if bits_k:
            found, shape = KeyStatistics(), None if matrices is None else [x[layer].float().to(k.device) for x in matrices]
            if shape is None:
                found.observe(q.float(), k.shape[1])
            found.take(k[:, :, SINK:-LAST].float())
            coder: Rows = rows(k.shape[-1], bits_k, 0, k.device)
            coder = coder if shape is None else Shaped(coder, *shape)
            k = put(k, found.restored(coder.decode(*coder.encode(found.stored(k.float())))))
        if bits_v:
            coder = rows(v.shape[-1], bits_v, 1, v.device)
            v = put(v, coder.decode(*coder.encode(v.float())))
        return k, v

    return change


def measured(reading: Reading, matrices: Matrices) -> Tensor:
    """The table ``fp32 [layers, 2, 6]``: the loss of each layer's keys and values coded alone at ``WIDTH`` bits, and from there to
    the other widths as all keys, or values, together go."""
    layers = range(len(reading.outputs))
    alone, together = torch.zeros(len(layers), 2), torch.zeros(2, len(NEARBY))
    for which in (0, 1):
        pair = lambda bits, which=which: (bits, 0) if which == 0 else (0, bits)  # noqa: E731
        for layer in layers:
            alone[layer, which] = reading.loss(coded({layer: pair(WIDTH)}, matrices), known=layer)
        for i, bits in enumerate(NEARBY):
            together[which, i] = reading.loss(coded(dict.fromkeys(layers, pair(bits)), matrices))
    three, four, five = together.clamp_min(1e-12).unbind(1)
    down, up = (three / four).clamp_min(1), (five / four).clamp_max(1)
    curve = torch.stack([down * down, down, torch.ones(2), up, up**2, up**4], 1)
    return (alone.clamp_min(1e-12) + EVEN * alone.mean(0))[:, :, None] * curve


def tables(target: Language) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and the verdict."""
    moments = Moments()
    for i, seed in enumerate(MORE):  # near positions count for more: texts are rarely as long as can be
        target.far(seed, (i / (len(MORE) - 1)) ** 2, moments.see)
    matrices = moments.matrices()
    count = len(matrices[0])
    reading = target.reading(JUDGED, LENGTH, LAST, FAR)  # at positions that moments were not taken at, too

    def loss(bits: Sequence[tuple[int, int]], own: Matrices) -> float:
        return reading.loss(coded(dict(enumerate(bits)), own))

    even = [(WIDTH, WIDTH)] * count
    plain, shaped = loss(even, None), loss(even, matrices)
    kept = matrices if shaped <= MARGIN * plain else None
    damage = measured(target.reading(ALONE, LENGTH, LAST), kept)
    uniform = {float(WIDTH): plain if kept is None else shaped}
    trials = []
    for average in AVERAGES:
        plainly = uniform.get(average) or loss([(int(average), int(average))] * count, kept)
        shared = loss(share_out(damage, average), kept)
        kept_bits = "shared" if shared <= MARGIN * plainly else "uniform"
        trials.append({"average": average, "shared": shared, "uniform": plainly, "kept": kept_bits})
    verdict = {"seeds": list(JUDGED), "bits": trials, "plain": plain, "shaped_k": shaped, "kept": [] if kept is None else ["k"]}
    return {DAMAGE: damage} | ({} if kept is None else {SHAPES[0]: kept[0], METRIC: kept[1]}), verdict
