"""Second moments of keys and values -> per-head KLT bases with a verdict each, and the scaling of a language model's keys."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..codecs.bases import Bases, BasesFile, Basis, hadamard, klt_of
from ..codecs.vector import MEAN_FROM
from ..hosts.calibration_targets import CalibrationTarget
from ..registry import build

KINDS = ("k", "v")
EVERY = 3  # computed calls between two that the verdict looks at


class Moments:
    """Running sums by layer and kind. ``see`` is the change for :func:`hosts.attention_interceptor.intercept_attention`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def see(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads = k.shape[1]
        for kind, x in zip(KINDS, (k, v), strict=True):
            x = x.detach().float()
            if x.shape[2] >= MEAN_FROM:  # as the codec takes a head's mean off from so many vectors on
                x = x - x.mean(2, keepdim=True)
            flat = rearrange(x, "b h n d -> h (b n) d")
            self._add(f"{layer}/{kind}", flat.mT @ flat)
            self._add(f"{layer}/{kind}/count", torch.tensor(float(flat.shape[1])))
        keys, queries = k.detach().float(), q.detach().float()
        self._add(f"{layer}/mean", keys.mean(2).sum(0))  # [heads, d]; one term a sample
        self._add(f"{layer}/k2", (keys - keys.mean(2, keepdim=True)).square().mean(2).sum(0))
        self._add(f"{layer}/q2", queries.unflatten(1, (heads, -1)).square().mean((2, 3)).sum(0))
        self._add(f"{layer}/n", torch.tensor(float(len(k))))
        return k, v

    def _add(self, name: str, x: Tensor) -> None:
        self.sums[name] = self.sums[name] + x.cpu() if name in self.sums else x.cpu()

    @property
    def layers(self) -> list[int]:
        return sorted(int(name.split("/")[0]) for name in self.sums if name.endswith("/mean"))

    def keys(self) -> dict[str, Tensor]:
        """``mean`` and ``scale fp32 [layers, heads, d]`` of the keys: stored as (k - mean) / scale, with queries times scale,
        every score stays what it was. scale = (E k^2 / E q^2)^(1/4), pooled over rotary pairs, as in :mod:`kv`."""
        means, scales = [], []
        for layer in self.layers:
            mean, k2, q2, n = (self.sums[f"{layer}/{what}"] for what in ("mean", "k2", "q2", "n"))
            pool = lambda x: x + x.roll(x.shape[-1] // 2, -1)  # noqa: E731
            k2, q2 = pool(k2 / n), pool(q2 / n)
            log = ((k2 + 1e-6 * k2.mean(-1, keepdim=True) + 1e-30) / (q2 + 1e-6 * q2.mean(-1, keepdim=True) + 1e-30)).log() / 4
            means.append(mean / n)
            scales.append((log - log.mean(-1, keepdim=True)).exp())
        return {"mean": torch.stack(means), "scale": torch.stack(scales)}

    def bases(self, bits: int) -> dict[str, list[Basis | None]]:
        """A KLT basis a head; None where there are fewer than 2 d vectors, with which it would be worse than none."""
        out: dict[str, list[Basis | None]] = {}
        for layer in self.layers:
            for kind in KINDS:
                total, count = self.sums[f"{layer}/{kind}"], float(self.sums[f"{layer}/{kind}/count"])
                out[f"{layer}/{kind}"] = [klt_of(m / count, bits) if count >= 2 * m.shape[-1] else None for m in total]
        return out


def vector_errors(codec: Any, x: Tensor, bases: Bases) -> Tensor:
    """Relative squared error of every vector of ``x [..., d]`` that ``codec`` codes along ``bases``: ``[...]``."""
    y = codec.decode(codec.encode(x, bases=bases), torch.float32, bases=bases)
    return (x - y).square().sum(-1) / x.square().sum(-1).clamp_min(1e-30)


def judge(
    target: CalibrationTarget, moments: Moments, bits: int, seed: int, model: str
) -> tuple[BasesFile, dict[str, list[dict[str, Any]]]]:
    """Bases for every stream, each judged on the trajectory of a seed that nothing was fitted on: a head whose KLT does not
    beat the random rotation there, coded by ``trellis`` at the same bytes, keeps the rotation."""
    found = moments.bases(bits)
    codec = build("codec", f"trellis:bits={bits}")
    errors: dict[str, dict[str, Tensor]] = {name: {} for name in found}
    seen: dict[int, int] = {}

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen[layer] = seen.get(layer, -1) + 1
        if seen[layer] % EVERY == 0:
            for kind, x in zip(KINDS, (k, v), strict=True):
                name = f"{layer}/{kind}"
                plain = hadamard(x.shape[-1], bits, codec.seed)
                mixed = Bases(tuple(plain.heads[0] if basis is None else basis for basis in found[name]))
                for what, bases in (("klt", mixed), ("hadamard", plain)):
                    gap = vector_errors(codec, x, bases).mean((0, 2)).cpu()
                    errors[name][what] = errors[name].get(what, 0) + gap
                errors[name]["n"] = errors[name].get("n", torch.tensor(0)) + 1
        return k, v

    target.final(seed, watch)
    streams, verdicts = {}, {}
    for name, heads in found.items():
        klt, rotation = (errors[name][what] / errors[name]["n"] for what in ("klt", "hadamard"))
        kept = [basis if float(klt[i]) < float(rotation[i]) else None for i, basis in enumerate(heads)]
        streams[name] = tuple(kept)
        verdicts[name] = [
            {"klt": float(klt[i]), "hadamard": float(rotation[i]), "kept": "hadamard" if basis is None else "klt"}
            for i, basis in enumerate(kept)
        ]
    return BasesFile(streams, bits, model), verdicts
