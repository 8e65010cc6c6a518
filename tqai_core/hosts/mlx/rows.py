"""Packed rows as mlx's quantised kernels read them: rotated, uniform levels, a scale and an offset for each group of coordinates.

Scale and offset are fitted by least squares to the codes, from a range that suits Gaussians: they err less than mlx's
own, which run from the smallest number to the largest (tests/test_mlx.py).
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ...codecs import rotation
from ...errors import TqaiError

STEP = 256  # rows a buffer grows by, as mlx-lm's own caches do
RANGE = {2: 0.62, 3: 0.85}  # of largest - smallest of 64 Gaussians: where uniform levels err least; 4 bits and more: all of it
FITS = 2  # rounds of least squares


def group_of(d: int) -> int:
    """Coordinates that share a scale and an offset. TqaiError for what mlx's kernels do not read."""
    if d % 32:
        raise TqaiError(f"head dimension {d} cannot be packed for mlx: its quantised kernels want a multiple of 32; use mlx-lm's own cache")
    return 64 if d % 64 == 0 else 32


@lru_cache(maxsize=32)
def turn(d: int, seed: int) -> mx.array:
    """The core's random rotation, ``fp32 [d, d]``: ``rotated = x @ turn.T``."""
    block = rotation.block_size(d)
    m = rotation.matrix(block, seed).numpy()
    return mx.array(m if block == d else np.kron(np.eye(d // block, dtype=np.float32), m))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes ``uint32 [..., d]`` as a stream of bits in words, lowest first: what ``mx.dequantize`` reads."""
    if 32 % bits == 0:
        parts = codes.reshape(*codes.shape[:-1], -1, 32 // bits) << (mx.arange(32 // bits, dtype=mx.uint32) * bits)
    else:
        ones = (codes[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
        parts = ones.reshape(*codes.shape[:-1], -1, 32) << mx.arange(32, dtype=mx.uint32)
    return parts.sum(-1).astype(mx.uint32)


def encode(x: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Rotated rows ``fp32 [..., d]`` -> words ``uint32 [..., d * bits / 32]``, scales and offsets ``[..., groups]`` of ``dtype``."""
    most = 2**bits - 1
    x = x.reshape(*x.shape[:-1], -1, group_of(x.shape[-1]))
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = (high - low) * (RANGE.get(bits, 1.0) / most)
    offset = (low + high - most * step) / 2
    level = lambda step, offset: mx.clip(mx.round((x - offset) / mx.where(step > 0, step, 1.0)), 0, most)  # noqa: E731
    mean = x.mean(-1, keepdims=True)
    for _ in range(FITS):
        codes = level(step, offset)
        middle = codes.mean(-1, keepdims=True)
        spread = (codes - middle).square().mean(-1, keepdims=True)
        fit = ((codes - middle) * (x - mean)).mean(-1, keepdims=True) / mx.maximum(spread, 1e-12)
        step = mx.where(spread > 0, fit, step)
        offset = mean - step * middle
    step, offset = step.astype(dtype), offset.astype(dtype)
    codes = level(step.astype(mx.float32), offset.astype(mx.float32))
    return pack(codes.astype(mx.uint32).flatten(-2), bits), step.squeeze(-1), offset.squeeze(-1)


class Rows:
    """Packed rows of consecutive tokens: words, scales and offsets ``[B, H, capacity, ...]``; ``count`` of the rows are in use."""

    def __init__(self, bits: int, seed: int) -> None:
        self.bits, self.seed, self.count = bits, seed, 0
        self.parts: list[mx.array] = []

    def add(self, x: mx.array, dtype: mx.Dtype) -> None:
        """Rotate, pack and append ``x fp32 [B, H, n, d]``."""
        new = encode(x @ turn(x.shape[3], self.seed).T, self.bits, dtype)
        end = self.count + x.shape[2]
        if not self.parts or self.parts[0].shape[2] < end:
            room = -(-end // STEP) * STEP
            for i, part in enumerate(new):  # one tensor at a time: the peak is one of them above what is held
                grown = mx.zeros((*part.shape[:2], room, part.shape[3]), part.dtype)
                if self.count:
                    grown[:, :, : self.count] = self.parts[i][:, :, : self.count]
                self.parts[i : i + 1] = [grown]
        for i, part in enumerate(new):
            self.parts[i][:, :, self.count : end] = part
        self.count = end

    @property
    def all_finite(self) -> bool:
        """Whether no NaN or inf was packed. Waits for the device: for reports."""
        return not self.count or all(bool(mx.isfinite(part).all().item()) for part in self.read()[1:])

    def read(self) -> list[mx.array]:
        return [part[:, :, : self.count] for part in self.parts]

    def scores(self, q: mx.array, dtype: mx.Dtype) -> mx.array:
        """Inner products of queries ``q fp32 [B, H, G, L, d]`` with the rows: ``[B, H, G, L, count]`` of ``dtype``."""
        d = q.shape[-1]
        return self._matmul((q @ turn(d, self.seed).T).astype(dtype), d, transpose=True)

    def weighted(self, weights: mx.array) -> mx.array:
        """Sums of the rows with ``weights [B, H, G, L, count]``: ``fp32 [B, H, G, L, d]``."""
        d = self.parts[0].shape[-1] * 32 // self.bits
        return self._matmul(weights, d, transpose=False).astype(mx.float32) @ turn(d, self.seed)

    def _matmul(self, x: mx.array, d: int, transpose: bool) -> mx.array:
        parts = [part[:, :, None] for part in self.read()]
        return mx.quantized_matmul(x, *parts, transpose=transpose, group_size=group_of(d), bits=self.bits)
