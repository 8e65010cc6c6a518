"""Bits by unit (layer x head x key or value x sigma band), from what each width is predicted to cost, and a verdict on runs.

Predicted damage falls fourfold a bit, so that greedy filling is the water level (Cover and Thomas, 10.3.3), with the measured
curves in place of the formula.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TqaiError
from ..hosts.calibration_targets import CalibrationTarget
from .file import codecs_of

LOW, HIGH = 2, 6  # one bit errs too much for a second-order prediction; from seven on gains are wider, and equal bits no equal bytes
MARGIN = 1.5  # an allocation is kept where uniform bits lose so many times as much


def water_fill(damage: Tensor, average: float, weight: Tensor | None = None) -> Tensor:
    """``uint8 [layers, heads, 2, bands]`` whose mean is ``average`` or just below, by the damage that one more bit removes.

    ``damage [layers, heads, 2, bands, 8]`` is what 1 to 8 bits cost in one call; ``weight [bands]`` the calls of a band, alike
    without. Units are alike in size, so that bits times calls are bytes.
    """
    if not LOW <= average <= HIGH:
        raise TqaiError(f"average of {average} bits: give {LOW} to {HIGH}")
    bands = damage.shape[-2]
    calls = [1] * bands if weight is None else [int(w) for w in weight]
    flat = damage.flatten(0, 3).double().cummin(-1).values  # more bits never cost more
    bits = [LOW] * len(flat)
    whole = sum(calls) * (len(flat) // bands)
    left = int(average * whole) - LOW * whole
    gain = lambda u: float(flat[u, bits[u] - 1] - flat[u, bits[u]])  # noqa: E731  # a call, as the cost is
    heap = [(-gain(u), u) for u in range(len(flat))]
    heapq.heapify(heap)
    while heap:
        _, u = heapq.heappop(heap)
        if (cost := calls[u % bands]) > left:
            continue
        bits[u] += 1
        left -= cost
        if bits[u] < HIGH:
            heapq.heappush(heap, (-gain(u), u))
    return torch.tensor(bits, dtype=torch.uint8).view(damage.shape[:4])


def quantised(target: CalibrationTarget, bits: Tensor, codec: str, counted: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """For :func:`hosts.attention_interceptor.intercept_attention`: every unit coded with its bits.

    ``counted[0]`` grows by the bytes of all codes."""
    codecs = codecs_of(codec)
    table = bits.tolist()

    def change(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for which, x in enumerate((k, v)):
            y = torch.empty_like(x)
            for head in range(x.shape[1]):
                own = codecs[table[layer][head][which][target.band]]
                packed = own.encode(x[:, head].contiguous())
                y[:, head] = own.decode(packed, x.dtype)
                counted[0] += packed.nbytes
            out.append(y)
        return out[0], out[1]

    return change


def trial(target: CalibrationTarget, bits: Tensor, codec: str, seeds: Sequence[int], exact: dict[int, Tensor]) -> dict[str, Any]:
    """Runs with keys and values coded all the way: relative loss of the end result, mean over ``seeds``, and bytes of the
    codes. ``exact`` keeps the end results of exact runs."""
    counted, loss = [0], 0.0
    for seed in seeds:
        if seed not in exact:
            exact[seed] = target.final(seed)
        out = target.final(seed, quantised(target, bits, codec, counted))
        loss += target.damage(out, exact[seed]) / target.size(exact[seed])
    return {"loss": loss / len(seeds), "bytes": counted[0]}


def allocate(
    target: CalibrationTarget, damage: Tensor, average: int, codec: str, choose: Sequence[int], seeds: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """The allocation and its verdict. Two are made, one with a width for each band and one with the same at all sigmas; runs of
    the seeds ``choose`` say which is better, and runs of ``seeds`` whether it is kept: it must lose ``MARGIN`` times less than
    uniform bits at the same bytes there, or uniform ones are written."""
    uniform = torch.full(damage.shape[:4], average, dtype=torch.uint8)
    calls = torch.zeros(damage.shape[3])

    def count(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        calls[target.band] += layer == 0
        return k, v

    exact = {choose[0]: target.final(choose[0], count)}
    made = {"by unit and band": water_fill(damage, average, calls)}
    if len(calls) > 1:
        joined = (damage * (calls / calls.sum())[:, None]).sum(-2, keepdim=True)
        made["by unit"] = water_fill(joined, average).expand_as(uniform).contiguous()
    tried = {name: trial(target, bits, codec, choose, exact)["loss"] for name, bits in made.items()}
    best = min(tried, key=tried.__getitem__)
    ours, plain = (trial(target, bits, codec, seeds, exact) for bits in (made[best], uniform))
    kept = ours["loss"] * MARGIN <= plain["loss"] and ours["bytes"] <= plain["bytes"]
    verdict = {
        "average": average, "how": best, "tried": tried, "seeds": list(seeds), "fisher": ours, "uniform": plain,
        "kept": "fisher" if kept else "uniform", "key_bits": float(made[best][:, :, 0].float().mean()),
        "value_bits": float(made[best][:, :, 1].float().mean()),
    }  # fmt: skip
    return (made[best] if kept else uniform), verdict
