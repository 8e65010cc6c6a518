"""The numbers that keys are centred and scaled by, per sequence, head and channel.

PyTorch and MLX share this file: it uses the operators and methods alone that both kinds of arrays have. Arrays are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLE = 1024  # tokens that statistics are taken from, evenly spread
FLOOR = 1e-6  # of the mean: a channel that is always zero must not get an infinite scale


def sample(x: Any) -> Any:
    """At most ``SAMPLE`` tokens of ``x [B, H, n, D]``, evenly spread."""
    return x[:, :, :: max(-(-x.shape[2] // SAMPLE), 1)]


@dataclass
class KeyStatistics:
    """Queries are observed until the statistics are taken, once; all arrays are ``[B, H, 1, D]``."""

    mean: Any = None
    scale: Any = None
    query_energy: Any = None  # running sum of squares of the queries of each kv head

    def observe(self, q: Any, heads: int) -> None:
        """Add the queries ``q [B, query heads, n, D]`` to the energy of the ``heads`` kv heads."""
        b, _, n, d = q.shape
        energy = q.square().reshape(b, heads, -1, n, d).sum((2, 3), keepdims=True).reshape(b, heads, 1, d)
        self.query_energy = energy if self.query_energy is None else self.query_energy + energy

    def take(self, k: Any, interleaved: bool = False) -> None:
        """Mean and scale of the keys ``k [B, H, n, D]``: scale = (E k^2 / E q^2)^(1/4), pooled over rotary pairs (i, i + d/2), or
        (2i, 2i + 1) where positions turn ``interleaved`` channels."""
        self.mean = k.mean(2, keepdims=True)
        if self.query_energy is None:  # an attention that hides its queries: centred only
            self.scale = self.mean**0
        else:
            k2 = pooled((k - self.mean).square().mean(2, keepdims=True), interleaved)
            q2 = pooled(self.query_energy, interleaved)
            ratio = (k2 + FLOOR * k2.mean(-1, keepdims=True) + 1e-30) / (q2 + FLOOR * q2.mean(-1, keepdims=True) + 1e-30)
            log = ratio.log() / 4
            self.scale = (log - log.mean(-1, keepdims=True)).exp()
        self.query_energy = None

    def stored(self, k: Any) -> Any:
        """Keys as they are packed: centred and scaled."""
        return k if self.mean is None else (k - self.mean) / self.scale

    def restored(self, k: Any) -> Any:
        """The inverse of :meth:`stored`."""
        return k if self.mean is None else k * self.scale + self.mean


def pooled(x: Any, interleaved: bool) -> Any:
    """Sums over rotary pairs, at both channels of a pair."""
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else x.reshape(*x.shape[:-1], 2, -1)
    return (pairs**0 * pairs.sum(-1 if interleaved else -2, keepdims=True)).reshape(x.shape)  # x**0 is 1 everywhere: to repeat the sum
