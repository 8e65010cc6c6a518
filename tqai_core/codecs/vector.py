"""The container that ``turbo`` and ``trellis`` share: vectors along the last dimension, tokens before it, heads before.

Token mean removed (a head's mean, 256 vectors or more) -> basis (random rotation, or a calibrated KLT) -> unit RMS ->
quantiser, a run of coordinates at a time -> bytes, and one log gain a vector, refitted by least squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TqaiError
from ..files import check_tensor
from ..registry import param
from ..roles import Codec
from ..types import AGAIN, Packed
from ..workspace import Workspace
from . import gain, rotation
from .bases import Bases, Basis, hadamard, load
from .scalar import run_bytes

MEAN_FROM = 256  # vectors a head from which its mean costs less than a sixteenth of a bit a coordinate
KINDS = ("lm", "tcq")
REACH = 8.0  # no level is larger, in standard deviations
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


class Quantiser(Protocol):
    chunk: int  # coordinates coded at a time: bounds the extra memory
    columns: bool  # whether it reads a vector's coordinates one after the other, for all vectors at once

    def encode(self, y: Tensor, inverse: Tensor, weight: Tensor | None, work: Workspace) -> tuple[Tensor, Tensor, Tensor]: ...

    def decode(self, packed: Tensor, d: int, work: Workspace) -> Tensor: ...


@dataclass(frozen=True)
class VectorCodec(Codec):
    """Base of the codecs of vectors; the module says what happens to a tensor."""

    bits: int = param(4, "bits a coordinate", low=1, high=8)
    mean: str = param("auto", "remove each head's token mean: auto = from 256 vectors a head", choices=("auto", "always", "never"))
    basis: str = param("hadamard", "hadamard, or the file of calibrated bases (per-head KLT)", file=True)
    seed: int = param(0, "seed of the rotation", low=0, high=2**31 - 1)

    def quantiser(self, bits: int, d: int | None, device: torch.device, kind: str) -> Quantiser:
        raise NotImplementedError

    def kind(self, vectors: int) -> str:
        """Which quantiser a call with so many vectors gets; written into the packed tensor."""
        raise NotImplementedError

    def belongs(self, model: Any) -> None:
        if self.basis != "hadamard":
            load(self.basis, model)

    def encode_stream(self, name: str, x: Tensor) -> Packed:
        """``x`` on the calibrated bases of this stream where the file has them at this width, else on the random rotation: files of
        ``tqai calibrate`` are of keys and values."""
        if self.basis == "hadamard":
            return self.encode(x)
        bases = load(self.basis)
        known = bases.streams.get(name, ())
        if bases.bits != self.bits or not known or any(b is not None and b.matrix.shape[-1] != x.shape[-1] for b in known):
            return replace(self, basis="hadamard").encode(x)
        return self.encode(x, stream=name)

    def encode(self, x: Tensor, stream: str | None = None, bases: Bases | None = None) -> Packed:
        """Code the vectors of ``x [..., heads, tokens, d]`` (bf16, fp16 or fp32; any strides; may be empty).

        ``stream`` names the tensor ("blocks.3/k") where the basis comes from a file; ``bases`` gives one directly.
        Raises ValueError for scalars, integer tensors, NaN and inf, and a stream that the file does not know.
        """
        if x.ndim == 0 or not x.is_floating_point():
            raise TqaiError(
                f"{self.name} codes vectors of floats [..., d]; got {x.dtype} of shape {tuple(x.shape)}: add a dimension or cast"
            )
        d, device = x.shape[-1], x.device
        tokens = x.shape[-2] if x.ndim > 1 else 1
        rows = x.reshape(-1, d)
        n, heads = len(rows), max(len(rows) // max(tokens, 1), 1)
        plan = self._plan(bases, stream, d, heads, device)
        kind = self.kind(n)
        tensors: dict[str, Tensor] = {}
        with_mean = n > 0 and (self.mean == "always" or (self.mean == "auto" and tokens >= MEAN_FROM))
        if with_mean:
            # rounded to what is stored before it is taken off, so that the rounding is coded, not lost
            tensors["mean"] = rows.view(heads, tokens, d).mean(1, dtype=torch.float32).to(torch.bfloat16)
        chunks = self._chunks(kind, plan, device, heads, tokens, with_mean)
        work = Workspace(device)
        if len(chunks) == 1:
            tensors["codes"], gains = self._encode(rows, tensors.get("mean"), plan[0], kind, work)
        else:  # results go into memory allocated first: chunk by chunk they would fragment what the next chunk reuses
            tensors["codes"] = torch.empty(n, plan[0].row_bytes, dtype=torch.uint8, device=device)
            gains = torch.empty(n, dtype=torch.float32, device=device)
            for head, i, j in chunks:
                mu = tensors["mean"][head] if with_mean else None
                tensors["codes"][i:j], gains[i:j] = self._encode(rows[i:j], mu, plan[head % len(plan)], kind, work)
        tensors["gain"], tensors["span"] = gain.encode(gains, 16 if self.bits >= 7 else 8)
        meta: dict[str, Any] = {"dtype": str(x.dtype)[6:], "kind": kind}
        if stream is not None:
            meta["stream"] = stream
        return Packed(self.spec, tuple(x.shape), tensors, meta)

    def _encode(self, rows: Tensor, mu: Tensor | None, basis: Basis, kind: str, work: Workspace) -> tuple[Tensor, Tensor]:
        """Bytes and gains of ``rows [n, d]``, which have one basis and one mean ``[d]``."""
        chunk = rows.float()
        mu = None if mu is None else mu.float().flatten()
        columns = self.quantiser(basis.runs[0][2] or 1, basis.levels_for, rows.device, kind).columns
        top: Tensor | float | None = None
        asks = rows.device.type == "cpu" and not torch.compiler.is_compiling()
        if not asks:  # a question to the device would wait for it: always scaled
            chunk = chunk.nan_to_num(0.0, 0.0, 0.0)
            top = chunk.abs().amax().clamp_min(1e-37) if chunk.numel() else None
        y, rms = _onto(basis, chunk, mu, top, columns, work)
        low, high = map(float, rms.aminmax()) if asks and rms.numel() else (1.0, 1.0)
        if not (low > 1e-12 and high < 1e15):  # squares left fp32, or a zero vector
            top = max(float(chunk.abs().max()), 1e-37)
            if not math.isfinite(top):
                raise TqaiError(f"{self.name} cannot code NaN or inf, and the tensor has some: drop or repair them first")
            y, rms = _onto(basis, chunk, mu, top, columns, work)
        inverse = rms.clamp_min(1e-30).reciprocal_()
        coded = []
        for a, b, bits in basis.runs:
            if bits:
                run = y if basis.whole else y[:, a:b]
                weight = None if basis.scale is None else basis.scale[a:b].square()
                coded.append(self.quantiser(bits, basis.levels_for, y.device, kind).encode(run, inverse, weight, work))
        code, above, below = coded[0]
        if len(coded) > 1:
            codes, tops, bottoms = zip(*coded, strict=True)
            code, above, below = torch.cat(codes, dim=1), torch.stack(tops).sum(0), torch.stack(bottoms).sum(0)
        rms = rms[:, 0]
        # least squares; the bounds keep a degenerate vector sane
        fit = torch.clamp(above / below.clamp_min(1e-30), rms * 0.25, rms * 4)
        return code, fit if top is None else fit * top

    def verify(self, packed: Packed) -> None:
        if packed.meta.get("bits") == 0:  # a step of a stream that sends its prediction alone
            return
        n, _, _, d = _check(packed)
        if "at" not in packed.meta and self.basis == "hadamard" and packed.tensors["codes"].shape[1] != run_bytes(d, self.bits):
            rows = packed.tensors["codes"].shape[1]
            raise TqaiError(f"field 'codes' has rows of {rows} bytes, {d} codes take {run_bytes(d, self.bits)}: {AGAIN}")
        if n == 0:
            return
        low, step = packed.tensors["span"].tolist()
        top = float(gain.decode(packed.tensors["gain"], packed.tensors["span"]).max())
        mean = float(packed.tensors["mean"].float().abs().max()) if "mean" in packed.tensors else 0.0
        if step < 0 or not top * REACH * d**0.5 + mean < torch.finfo(torch.float32).max:
            raise TqaiError(f"field 'span' is {low:g}, {step:g} and the mean goes to {mean:g}: gains that no tensor has; {AGAIN}")

    def decode_rotated(self, packed: Packed, dtype: torch.dtype | None = None, bases: Bases | None = None) -> Tensor:
        """The vectors in the basis' own domain, without the mean. Faster than :meth:`decode`.

        ``(rotate(q) * decode_rotated(p)).sum(-1) + (q * mean).sum(-1) == (q * decode(p)).sum(-1)``: the mean adds one
        number to all scores of a query, which softmax ignores.
        """
        return self.decode(packed, dtype, bases, rotated=True)

    def rotate(self, q: Tensor, packed: Packed | None = None, bases: Bases | None = None) -> Tensor:
        """Bring ``q [..., heads, tokens, d]`` into the domain of :meth:`decode_rotated`; fp32, same shape."""
        d = q.shape[-1]
        plan = self._plan(bases, packed.meta.get("stream") if packed else None, d, None, q.device)
        if len(plan) == 1:
            return plan[0].forward(q.reshape(-1, d).float()).view(q.shape)
        if q.ndim < 3 or q.shape[-3] != len(plan):
            raise TqaiError(f"q has shape {tuple(q.shape)}; the basis has {len(plan)} heads: give [..., {len(plan)}, tokens, d]")
        out = [plan[h].forward(q[..., h, :, :].reshape(-1, d).float()).view(q[..., h, :, :].shape) for h in range(len(plan))]
        return torch.stack(out, dim=-3)

    def decode(self, packed: Packed, dtype: torch.dtype | None = None, bases: Bases | None = None, rotated: bool = False) -> Tensor:
        """The tensor again, in ``dtype`` or its own; ``rotated`` as :meth:`decode_rotated` says."""
        if packed.codec != self.spec:
            raise TqaiError(f"packed by {packed.codec!r}, this codec is {self.spec!r}: decode with tqai.codec(packed.codec)")
        n, tokens, heads, d = _check(packed)
        kind, codes = packed.meta["kind"], packed.tensors["codes"]
        dtype = dtype or DTYPES[packed.meta["dtype"]]
        plan = self._plan(bases, packed.meta.get("stream"), d, heads, codes.device)
        if codes.shape[1] != plan[0].row_bytes:
            raise TqaiError(f"field 'codes' has rows of {codes.shape[1]} bytes, expected {plan[0].row_bytes}: {AGAIN}")
        gains = gain.decode(packed.tensors["gain"], packed.tensors["span"])[:, None]
        mean = None if rotated else packed.tensors.get("mean")
        work = Workspace(codes.device)
        chunks = self._chunks(kind, plan, codes.device, heads, tokens, mean is not None)
        if len(chunks) == 1:
            return self._decode_chunk(codes, gains, mean, plan[0], kind, dtype, rotated, work).to(dtype).view(packed.shape)
        out = torch.empty(n, d, dtype=dtype, device=codes.device)
        for head, i, j in chunks:
            mu = None if mean is None else mean[head]
            out[i:j] = self._decode_chunk(codes[i:j], gains[i:j], mu, plan[head % len(plan)], kind, dtype, rotated, work)
        return out.view(packed.shape)

    def _decode_chunk(
        self, codes: Tensor, gains: Tensor, mean: Tensor | None, basis: Basis, kind: str, dtype: torch.dtype, rotated: bool, work: Workspace
    ) -> Tensor:
        """Vectors ``fp32 [n, d]`` with one basis and one mean, in ``work``; within the range of ``dtype``."""
        u = self._levels(codes, basis, kind, work)
        back = not rotated and basis.butterfly(u)
        if back:
            u = rotation.hadamard(u, basis.small, work.take("y", tuple(u.shape)))
        elif not rotated:
            k = len(basis.matrix)
            u = torch.mm(u.reshape(-1, k), basis.matrix, out=work.take("y", (u.numel() // k, k))).view(u.shape)
        u = u.mul_(gains)
        if not back:
            if mean is not None:
                u.add_(mean.float())
        elif mean is None:
            u.mul_(basis.signs)  # type: ignore[arg-type]
        else:
            torch.addcmul(mean.float(), u, basis.signs, out=u)  # type: ignore[arg-type]
        return u.clamp_(-65504, 65504) if dtype == torch.float16 else u  # rounding must not make an inf

    def _levels(self, codes: Tensor, basis: Basis, kind: str, work: Workspace) -> Tensor:
        decode = lambda bits, codes, d: self.quantiser(bits, basis.levels_for, codes.device, kind).decode(codes, d, work)  # noqa: E731
        d = basis.runs[-1][1]
        if basis.whole:
            u = decode(basis.runs[0][2], codes, d)
        else:
            u, at = torch.zeros(len(codes), d, device=codes.device), 0
            for a, b, bits in basis.runs:
                if bits:
                    size = run_bytes(b - a, bits)
                    u[:, a:b] = decode(bits, codes[:, at : at + size].contiguous(), b - a)
                    at += size
        return u if basis.scale is None else u.mul_(basis.scale)

    def _chunks(
        self, kind: str, plan: tuple[Basis, ...], device: torch.device, heads: int, tokens: int, with_mean: bool
    ) -> list[tuple[int, int, int]]:
        """(head, first row, last row + 1) of the vectors coded at a time; all heads as one where they are coded alike."""
        bits = max(bits for _, _, bits in plan[0].runs)
        chunk = self.quantiser(bits, plan[0].levels_for, device, kind).chunk
        step = max(chunk // max(plan[0].runs[-1][1], 1), 1)
        if len(plan) == 1 and not with_mean:
            heads, tokens = 1, heads * tokens
        return [(head, head * tokens + i, head * tokens + min(i + step, tokens)) for head in range(heads) for i in range(0, tokens, step)]

    def _plan(self, bases: Bases | None, stream: str | None, d: int, heads: int | None, device: torch.device) -> tuple[Basis, ...]:
        """The basis of every head, or one for all of them."""
        if bases is not None:
            return bases.at(device)
        if self.basis == "hadamard":
            return hadamard(d, self.bits, self.seed).at(device)
        return load(self.basis).of(stream, d, heads, self.bits, self.seed).at(device)


def _onto(basis: Basis, x: Tensor, mu: Tensor | None, top: Tensor | float | None, columns: bool, work: Workspace) -> tuple[Tensor, Tensor]:
    """``x / top`` without its mean on the axes of ``basis``, in ``work``, and its RMS ``[n, 1]`` over the coordinates with
    bits. ``columns``: stored coordinate by coordinate."""
    n, d = x.shape
    if basis.butterfly(x):
        assert basis.signs is not None
        # an even number of butterflies ends where the small product was written: that one is to be "y"
        before, after = ("scaled", "y") if rotation.stages(d) % 2 == 0 else ("y", "scaled")
        if columns:
            small = basis.signed if top is None else basis.signed / top
            y = rotation.hadamard_columns(x, small, work.take(after, (d, n)), work.take(before, (d, n)))
            if mu is not None:
                y.sub_(((mu if top is None else mu / top) @ basis.columns)[:, None])
            y = y.T
        else:
            signs = basis.signs if top is None else basis.signs / top
            flipped = work.take(before, (n, d))
            if mu is None:
                torch.mul(x, signs, out=flipped)
            else:
                torch.addcmul(mu * -signs, x, signs, out=flipped)
            y = rotation.hadamard(flipped, basis.small, work.take(after, (n, d)))
    else:
        down = basis.columns if top is None else basis.columns / top
        k = len(down)
        if columns and basis.block is None:  # the product writes either layout alike
            y = work.take("y", (d, n)).T
            torch.mm(x, down, out=y)
        else:
            y = work.take("y", (n, d))
            torch.mm(x.reshape(-1, k), down, out=y.view(-1, k))
        if mu is not None:
            y.sub_((mu.view(-1, k) @ down).flatten())
    if basis.scale is not None:
        y.div_(basis.scale)
    live = y if basis.whole else y[:, basis.active]
    root = max(live.shape[-1], 1) ** 0.5
    if not columns:
        return y, torch.linalg.vector_norm(live, dim=-1, keepdim=True) / root
    # along columns a norm is ten times slower than its parts
    return y, torch.mul(live, live, out=work.take("scaled", live.T.shape).T).sum(-1, keepdim=True).sqrt_() / root


def _check(packed: Packed) -> tuple[int, int, int, int]:
    """What a damaged or foreign file may have wrong, by field. Vectors, tokens, heads and the size of a vector."""
    if not packed.shape:
        raise TqaiError(f"field 'shape' is empty, vectors have at least one dimension: {AGAIN}")
    *lead, d = packed.shape
    n, tokens = math.prod(lead), lead[-1] if lead else 1
    heads = max(n // max(tokens, 1), 1)
    check_tensor(packed.tensors, "codes", (n, None), (torch.uint8,), AGAIN)
    check_tensor(packed.tensors, "gain", (n,), (torch.uint8, torch.uint16), AGAIN)
    check_tensor(packed.tensors, "span", (2,), (torch.float32,), AGAIN)
    if "mean" in packed.tensors:
        check_tensor(packed.tensors, "mean", (heads, d), (torch.bfloat16,), AGAIN)
    kind, dtype = packed.meta.get("kind"), packed.meta.get("dtype")
    if kind not in KINDS or dtype not in DTYPES:
        raise TqaiError(f"field 'kind' or 'dtype' is unknown ({kind!r}, {dtype!r}): {AGAIN}")
    return n, tokens, heads, d
