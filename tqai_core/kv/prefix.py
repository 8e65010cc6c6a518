"""Keys and values that come as a whole and are read at many steps: references, prefixes and earlier frames of diffusion transformers.

:mod:`kv.cache` packs tokens as they arrive; here all tokens of a layer are known at once, so statistics are taken from all of them and
nothing waits. Rows, statistics and axes are the same: keys centred and scaled by what queries need (:mod:`kv.statistics`), values on
their own axes where that pays (:mod:`codecs.split`). Torch alone, no model library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codecs import split
from ..codecs.rows import Rows, rows
from ..codecs.split import Split
from ..types import nbytes
from .segments import SEGMENT, BitTier, Plan, Segment
from .statistics import KeyStatistics, sample


@dataclass(frozen=True)
class Prefix:
    """The keys and values of one layer, ``n`` tokens: the first and the last ones exact, those between packed; or all exact.

    Attributes:
        tier: what attention reads.
        device: where it is read; the packed rows may lie on the host.
        why: the reason why nothing is packed; "" where it is.
        error: NMSE of the packed keys and of the packed values, two fp32 numbers on the device.
    """

    tier: BitTier
    device: torch.device
    why: str = ""
    error: Tensor | None = None

    @staticmethod
    def pack(
        k: Tensor,
        v: Tensor,
        plan: Plan,
        queries: Tensor | None = None,
        interleaved: bool = False,
        known: Prefix | None = None,
        host: bool = False,
    ) -> Prefix:
        """Pack ``k, v [B, n, H, D]``.

        ``queries``: sum of squares of the queries of each head ``[B, H, 1, D]``, from which keys take their scale; None: they are
        centred only. ``interleaved``: rotary positions turn channels (2i, 2i + 1). ``known``: what is held of the same layer so far: its
        statistics and axes are kept, so that a token that was packed before gets the codes that it had. ``host``: packed rows lie there.
        """
        keys, values = k.detach().transpose(1, 2), v.detach().transpose(1, 2)
        size = keys.shape[2] - plan.sink - plan.recent
        coders = rows(k.shape[-1], plan.bits_k, plan.seed, k.device), rows(v.shape[-1], plan.bits_v, plan.seed + 1, v.device)
        if keys.shape[2] < plan.calibrate or size < 1:
            least = max(plan.calibrate, plan.sink + plan.recent + 1)
            return Prefix(BitTier(keys, values, (), *coders, None, None, keys.shape[2], 0), k.device, f"fewer than {least} tokens")
        inner = slice(plan.sink, plan.sink + size)
        if known is not None and known.tier.packed and known.tier.keys.shape[:2] == keys.shape[:2]:
            statistics, coder_v = KeyStatistics(known.tier.mean, known.tier.scale), known.tier.coder_v
        else:
            statistics = _statistics(keys[:, :, inner], plan, queries, interleaved)
            coder_v = split.coder(sample(values[:, :, inner]).float(), coders[1], size, plan.seed + 1)
        segments, error = _segments(keys[:, :, inner], values[:, :, inner], statistics, coders[0], coder_v)
        if error is None:
            whole = BitTier(keys, values, (), *coders, None, None, keys.shape[2], 0)
            return Prefix(whole, k.device, "keys or values hold NaN or inf")
        if host:
            for segment in segments:
                segment.map(lambda x: x.to("cpu"))
        ends = [torch.cat([x[:, :, : plan.sink], x[:, :, plan.sink + size :]], 2) for x in (keys, values)]
        tier = BitTier(ends[0], ends[1], segments, coders[0], coder_v, statistics.mean, statistics.scale, plan.sink, size)
        return Prefix(tier, k.device, error=error)

    @property
    def length(self) -> int:
        return self.tier.length

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the keys and of the values, ``[B, n, H, D]``."""
        k, v = ((x.shape[0], self.length, x.shape[1], x.shape[3]) for x in (self.tier.keys, self.tier.values))
        return k, v

    @property
    def dtype(self) -> torch.dtype:
        return self.tier.keys.dtype

    @property
    def packed(self) -> int:
        """How many of the tokens are packed."""
        return self.tier.packed

    @property
    def nbytes(self) -> int:
        """Bytes of everything held; tables that a seed can rebuild are not counted."""
        tier = self.tier
        return nbytes(
            [[vars(part) for part in tier.segments], tier.keys, tier.values, tier.mean, tier.scale, tier.coder_v.basis, self.error]
        )

    @property
    def numbers(self) -> int:
        """How many numbers the keys and values of all tokens are."""
        return self.tier.length * sum(x.shape[0] * x.shape[1] * x.shape[3] for x in (self.tier.keys, self.tier.values))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, n, H, D]`` in the model's dtype. Decoded a segment at a time: the peak is little above the result."""
        tier = self.tier
        if not tier.packed:
            return tier.keys.transpose(1, 2), tier.values.transpose(1, 2)
        found = []
        for exact in (tier.keys, tier.values):
            b, h, _, d = exact.shape
            out = exact.new_empty(b, tier.length, h, d)
            out[:, : tier.sinks], out[:, tier.sinks + tier.packed :] = (
                x.transpose(1, 2) for x in (exact[:, :, : tier.sinks], exact[:, :, tier.sinks :])
            )
            found.append(out)
        at = tier.sinks
        for segment in tier.segments:
            end = at + len(segment)
            for out, x in zip(found, _decoded(self._here(segment), tier), strict=True):
                out[:, at:end] = x.transpose(1, 2)
            at = end
        return found[0], found[1]

    def readable(self) -> BitTier:
        """The tier on the device that reads it, statistics in fp32 as attention wants them."""
        tier = self.tier
        mean, scale = (None if x is None else x.float() for x in (tier.mean, tier.scale))
        return replace(tier, segments=[self._here(segment) for segment in tier.segments], mean=mean, scale=scale)

    def offload(self) -> Prefix:
        """Its packed rows moved to host memory."""
        for segment in self.tier.segments:
            segment.map(lambda x: x.to("cpu"))
        return self

    def _here(self, segment: Segment) -> Segment:
        return Segment(*(x.to(self.device, non_blocking=True) for x in vars(segment).values()))


def _statistics(keys: Tensor, plan: Plan, queries: Tensor | None, interleaved: bool) -> KeyStatistics:
    """Mean and scale, rounded to bf16 before anything is packed by them: the rounding costs nothing."""
    found = KeyStatistics()
    if plan.calibrate:
        found.query_energy = queries
        found.take(sample(keys).float(), interleaved)
        found.mean, found.scale = found.mean.bfloat16(), found.scale.bfloat16()
    return found


def _segments(
    keys: Tensor, values: Tensor, statistics: KeyStatistics, coder_k: Rows, coder_v: Rows | Split
) -> tuple[list[Segment], Tensor | None]:
    """The packed tokens and their error; None instead of it where they are not finite. The device is asked once."""
    segments: list[Segment] = []
    wrong, energy = torch.zeros(2, device=keys.device), torch.zeros(2, device=keys.device)
    for at in range(0, keys.shape[2], SEGMENT):
        k, v = (x[:, :, at : at + SEGMENT].float() for x in (keys, values))
        segment = Segment(*coder_k.encode(statistics.stored(k)), *coder_v.encode(v))
        decoded = statistics.restored(coder_k.decode(segment.codes_k, segment.gain_k)), coder_v.decode(segment.codes_v, segment.gain_v)
        wrong += torch.stack([(own - x).square().sum() for own, x in zip(decoded, (k, v), strict=True)])
        energy += torch.stack([k.square().sum(), v.square().sum()])
        segments.append(segment)
    return segments, wrong / energy.clamp_min(1e-30) if bool(wrong.isfinite().all()) else None


def _decoded(segment: Segment, tier: BitTier) -> tuple[Tensor, Tensor]:
    k = tier.coder_k.decode(segment.codes_k, segment.gain_k)
    return KeyStatistics(tier.mean, tier.scale).restored(k), tier.coder_v.decode(segment.codes_v, segment.gain_v)


def energy(q: Tensor, heads: int) -> Tensor:
    """Sum of squares ``[B, H, 1, D]`` of some of the queries ``q [B, n, H, D]`` or ``[B, n, H D]``, evenly spread."""
    q = q.detach() if q.ndim == 4 else q.detach().unflatten(-1, (heads, -1))
    found = KeyStatistics()
    found.observe(sample(q.transpose(1, 2)).float(), q.shape[2])
    return found.query_energy
