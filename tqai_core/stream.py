"""A trajectory of one tensor as a sequence of packed steps: closed-loop predictive coding (DPCM).

Each step codes what the decoder's own last reconstructions do not predict, so errors never build up and no raw tensor is
kept. Worth it where a whole trajectory is stored or sent (replay, editing, inversion); a cache that keeps only the latest
value is served as well by one independent code of the same bytes, since the decoder must hold its reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .codecs.bases import NMSE, Bases, hadamard, klt
from .codecs.packing import pack, row_bytes, unpack
from .codecs.vector import VectorCodec
from .errors import TqaiError
from .files import check_tensor, checked
from .registry import build
from .types import AGAIN, Packed, nbytes

PREDICTORS = ("none", "delta", "delta2", "ls", "choice")


@dataclass
class _Past:
    """The decoder's state: up to two reconstructions (fp32), their times, and the last decoded residual."""

    values: list[tuple[float, Tensor]] = field(default_factory=list)
    residual: Tensor | None = None
    count: int = 0


class StreamCoder:
    """Codes a tensor that changes slowly from step to step.

    ``predictor``: ``none`` (every step alone), ``delta`` (the last value), ``delta2`` (the line through the last two,
    over sigma), ``ls`` (least-squares weights of the last two, two fp16 numbers a step), ``choice`` (the best of nothing,
    delta, delta2 and ls for each vector, two flag bits). ``bits`` a step, the last entry goes on; 0 sends the prediction
    alone. ``nmse`` instead of ``bits``: each step gets the fewest bits that keep its error below it. ``key_every`` makes
    every n-th step independent. ``basis="adaptive"`` (with ``none``) codes along the KLT of what was decoded last, head by
    head, where a head has twice as many tokens as dimensions (else as ``hadamard``): no side
    information; the decoder repeats the eigendecomposition, so decode on a machine like the encoder's.

    >>> coder = StreamCoder("ls", codec="trellis", bits=(8, 4, 3))      # doctest: +SKIP
    >>> packed = [coder.encode(x, sigma) for x, sigma in steps]         # doctest: +SKIP
    >>> decoded = coder.decode(packed)                                  # doctest: +SKIP
    """

    def __init__(
        self,
        predictor: str = "delta2",
        *,
        codec: Any = "trellis",
        bits: int | Sequence[int] = (8, 4),
        nmse: float | None = None,
        key_every: int = 0,
        basis: str = "hadamard",
    ) -> None:
        if predictor not in PREDICTORS:
            raise TqaiError(f"unknown predictor {predictor!r}; known: {', '.join(PREDICTORS)}")
        built = build("codec", codec)
        if not isinstance(built, VectorCodec):
            raise TqaiError(f"codec {built.name!r} codes no residuals; give turbo or trellis")
        widths = (bits,) if isinstance(bits, int) else tuple(bits)
        if not widths or any(not isinstance(b, int) or not 0 <= b <= 8 for b in widths) or widths[0] == 0:
            raise TqaiError(f"bits={bits!r}: give widths from 0 to 8, one a step, the first at least 1")
        if nmse is not None and not 0 < nmse < 1:
            raise TqaiError(f"nmse={nmse!r}: give the relative squared error a step may have, between 0 and 1")
        if basis not in ("hadamard", "adaptive"):
            raise TqaiError(f"unknown basis {basis!r}; known: hadamard, adaptive")
        if basis == "adaptive" and predictor != "none":
            raise TqaiError("basis='adaptive' is for predictor='none': residuals have no stable axes")
        if key_every < 0:
            raise TqaiError(f"key_every={key_every}: give 0 (never) or a number of steps")
        self.predictor, self.codec, self.key_every, self.basis = predictor, built, key_every, basis
        self.bits, self.nmse = widths, nmse
        self.bytes_sent = 0
        self._past = _Past()

    @property
    def nbytes(self) -> int:
        """Bytes held between steps: the reconstructions that the next prediction needs. Never a raw tensor."""
        return nbytes([[v for _, v in self._past.values], self._past.residual])

    @property
    def last(self) -> Tensor | None:
        """What the decoder has of the newest step."""
        return self._past.values[0][1] if self._past.values else None

    def reset(self) -> None:
        """Forget the stream; the next step is a first one."""
        self._past, self.bytes_sent = _Past(), 0

    @torch.no_grad()
    def encode(self, x: Tensor, step: float | None = None) -> Packed:
        """The next step of the stream, ``x [..., heads, tokens, d]``; ``step`` is its sigma (default: minus its index)."""
        past = self._past
        if past.values and past.values[0][1].shape != x.shape:
            raise TqaiError(f"the stream has shape {tuple(past.values[0][1].shape)}, this step {tuple(x.shape)}: reset() for another one")
        at = -float(past.count) if step is None else float(step)
        bits, key = self._width(past)
        exact, side = x.float(), dict[str, Tensor]()
        guess = None if key else self._predict(past, at, exact, side)
        if self.nmse is not None:
            left = 1.0 if guess is None else float((exact - guess).square().sum() / exact.square().sum().clamp_min(1e-30))
            bits = next((b for b, e in enumerate(NMSE) if e * left <= self.nmse), 8)
            bits = max(bits, 1) if guess is None else bits
        tensors, meta, codec = side, dict[str, Any](), replace(self.codec, bits=max(bits, 1))
        if bits:
            packed = codec.encode(exact if guess is None else exact - guess, bases=self._axes(past, exact, bits, key))
            tensors, meta = {**packed.tensors, **side}, dict(packed.meta)
        sent = Packed(codec.spec, tuple(x.shape), tensors, {**meta, "dtype": str(x.dtype)[6:], "at": at, "bits": bits, "key": key})
        self._advance(past, sent, guess)
        self.bytes_sent += sent.nbytes
        return sent

    @torch.no_grad()
    def decode(self, steps: Iterable[Packed]) -> list[Tensor]:
        """All tensors of a stream from its first step on; the encoder's own state is not touched."""
        past = _Past()
        out: list[Tensor] = []
        for packed in steps:
            if not out and not packed.meta.get("key", False):
                raise TqaiError("the first packed step needs the ones before it: start at the first or at a key step")
            self._check(packed, out)
            guess = None if packed.meta["key"] else self._predict(past, packed.meta["at"], None, dict(packed.tensors))
            value = self._advance(past, packed, guess)
            out.append(value.to(getattr(torch, packed.meta["dtype"])))
        return out

    def _check(self, packed: Packed, before: Sequence[Tensor]) -> None:
        """TqaiError unless ``packed`` can be the step after ``before``: it may come from a file."""
        checked("StepMeta", packed.meta, what="packed step", again=AGAIN)
        key, bits, count = packed.meta["key"], packed.meta["bits"], math.prod(packed.shape[:-1])
        if before[-1].shape != packed.shape if before else bits == 0:
            raise TqaiError(f"field 'shape' or 'bits' is {list(packed.shape)}, {bits}: no step of this stream; {AGAIN}")
        if not key and self.predictor in ("ls", "choice"):
            check_tensor(packed.tensors, "weights", (2,), (torch.float16,), AGAIN)
        if not key and self.predictor == "choice":
            check_tensor(packed.tensors, "choice", (1, row_bytes(count, 2)), (torch.uint8,), AGAIN)

    def _width(self, past: _Past) -> tuple[int, bool]:
        key = past.count == 0 or (self.key_every > 0 and past.count % self.key_every == 0)
        if key:
            return self.bits[0], True
        since = past.count % self.key_every if self.key_every else past.count
        return self.bits[min(since, len(self.bits) - 1)], self.predictor == "none" and self.basis == "hadamard"

    def _advance(self, past: _Past, packed: Packed, guess: Tensor | None) -> Tensor:
        """What the decoder knows after this step; the encoder goes the same way."""
        bits = packed.meta["bits"]
        value = torch.zeros(packed.shape) if guess is None else guess
        if bits:
            codec = replace(self.codec, bits=bits)
            inner = Packed(codec.spec, packed.shape, packed.tensors, {**packed.meta, "dtype": "float32"})
            residual = codec.decode(inner, torch.float32, bases=self._axes(past, packed, bits, packed.meta["key"]))
            value = residual if guess is None else guess + residual
            if self.basis == "adaptive":
                past.residual = residual
        past.values = [(packed.meta["at"], value), *past.values][: 1 if self.predictor in ("none", "delta") else 2]
        past.count += 1
        return value

    def _axes(self, past: _Past, x: Tensor | Packed, bits: int, key: bool) -> Bases | None:
        """The KLT of what was decoded last, a head; None leaves the codec its rotation."""
        last = past.residual
        d = x.shape[-1]
        if self.basis != "adaptive" or key or last is None or last.ndim < 2 or last.shape[-2] < 2 * d:
            return None
        rows = last.reshape(-1, last.shape[-2], d)
        plain = hadamard(d, bits, self.codec.seed).heads[0]
        return Bases(tuple(klt(head, bits, centred=False) if bool(head.any()) else plain for head in rows))

    def _predict(self, past: _Past, at: float, x: Tensor | None, side: dict[str, Tensor]) -> Tensor | None:
        """The prediction; with ``x`` (encoding) side information is written into ``side``, without it is read."""
        if self.predictor == "none":
            return None
        (t1, x1), *rest = past.values
        if self.predictor == "delta":
            return x1
        t2, x2 = rest[0] if rest else (t1, x1)
        line = x1 if t1 == t2 else x1 + (x1 - x2) * ((at - t1) / (t1 - t2))
        if self.predictor == "delta2":
            return line
        if x is not None:
            side["weights"] = _least_squares(x, x1, x2 if rest else None)
        w = side["weights"].float()
        fitted = w[0] * x1 + w[1] * x2
        if self.predictor == "ls":
            return fitted
        # a tensor at a time, so that four candidates are never held at once
        candidates = (lambda: torch.zeros_like(x1), lambda: x1, lambda: line, lambda: fitted)
        if x is not None:
            best = torch.full(x1.shape[:-1], math.inf, device=x1.device)
            pick = torch.zeros_like(best, dtype=torch.uint8)
            for i, make in enumerate(candidates):
                energy = (x - make()).square_().sum(-1)
                better = energy < best
                best, pick = torch.where(better, energy, best), pick.masked_fill_(better, i)
            side["choice"] = pack(pick.view(1, -1), 2)
        flags = unpack(side["choice"], x1[..., 0].numel(), 2).view(x1.shape[:-1])
        out = torch.zeros_like(x1)
        for i, make in enumerate(candidates[1:], start=1):
            out = torch.where((flags == i)[..., None], make(), out)
        return out


def _least_squares(x: Tensor, x1: Tensor, x2: Tensor | None) -> Tensor:
    """fp16 weights ``[2]`` of the last two reconstructions that fit ``x`` best."""
    a = torch.stack([x1.flatten()] + ([x2.flatten()] if x2 is not None else []))
    normal, right = (a @ a.T).double(), (a @ x.flatten()).double()
    normal = normal + 1e-9 * normal.diagonal().mean() * torch.eye(len(a), dtype=normal.dtype, device=x.device)
    w = torch.linalg.lstsq(normal.cpu(), right.cpu()[:, None]).solution[:, 0]
    out = torch.zeros(2)
    out[: len(w)] = w.float().nan_to_num(0.0).clamp(-8, 8)
    return out.half().to(x.device)
