"""Keys and values of earlier frames of a video that grows block by block: the first frames and the last ones exact, those between packed.

For engines that make video autoregressively (Self-Forcing 2506.08009, CausVid 2412.07772): one :class:`Rolling` for each layer, and for
each branch of guidance that is no row of the batch. Frames leave the recent ones in groups and are packed once, by
:class:`~tqai_core.codecs.transform.Transform`; the oldest frames behind the first ones leave by the frame. Keys may come before or after
rotary positions: before them, neighbouring frames are more alike, and positions may roll. Torch alone, no model library.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..codecs.transform import Group, Transform
from ..errors import TqaiError
from ..types import nbytes
from .statistics import pooled, sample

CODECS = ("transform", "exact")
AGAIN = 4.0  # times the expected error from which a group gets a coder of its own: the picture has changed
Pair = tuple[Tensor, Tensor]
Coders = tuple[Transform, Transform]


@dataclass
class Packed:
    """A group of frames. A sequence is coded on its own, whatever else is in the batch."""

    rows: list[tuple[Group, Group]]  # keys and values of each sequence
    coders: list[Coders]


@dataclass(frozen=True)
class Coded:
    """A group of one sequence by some coders, and the squared error of keys and of values: of what is stored, and of what is read."""

    groups: tuple[Group, Group]
    coders: Coders
    wrong: Tensor  # fp32 [2], of the energy of what is stored
    error: Tensor  # fp32 [2], of all energy

    @staticmethod
    def of(pair: Pair, coders: Coders) -> Coded:
        groups, wrong, error = [], [], []
        for x, coder in zip(pair, coders, strict=True):
            groups.append(coder.encode(x))
            back, stored = coder.decode(groups[-1]), coder.stored(x)
            wrong.append((coder.stored(back) - stored).square().sum() / stored.square().sum().clamp_min(1e-30))
            error.append((back - x).square().sum() / x.square().sum().clamp_min(1e-30))
        return Coded((groups[0], groups[1]), coders, torch.stack(wrong), torch.stack(error))


class Rolling:
    """The history of one layer. ``append`` the keys and values of clean frames, ``get`` all that is held.

    Attributes:
        frame: tokens of a frame.
        sink: first frames, which stay, exact.
        recent: last frames, exact.
        window: most frames that are held, all together; behind the first ones the oldest leave.
        group: frames that are packed together.
        bits_k, bits_v: of a packed number, gains included. Axes and statistics come on top (:mod:`codecs.transform`).
        codec: ``"transform"``, or ``"exact"``, which packs nothing.
        interleaved: whether rotary positions turn channels (2i, 2i + 1); else (i, i + D / 2).
        why: the reason why this history can no longer pack; "" where it can.
        error: NMSE of the packed keys and values of the worst group so far, ``fp32 [2]`` on the device.
    """

    def __init__(
        self, frame: int, *, sink: int = 1, recent: int = 4, window: int = 32, group: int = 4, bits_k: float = 2.0, bits_v: float = 2.0,
        codec: str = "transform", interleaved: bool = True,
    ) -> None:  # fmt: skip
        if codec not in CODECS:
            raise TqaiError(f"codec {codec!r} asked for a rolling history; it has {' and '.join(CODECS)}")
        if frame < 1 or group < 1 or min(sink, recent) < 0 or window < max(sink + recent, 1):
            raise TqaiError(
                f"a history of {window} frames of {frame} tokens, {sink} first and {recent} last ones exact, groups of {group}: give a "
                "window of at least sink + recent frames, and frames and groups of at least one"
            )
        if not (0.25 <= bits_k <= 8 and 0.25 <= bits_v <= 8):
            raise TqaiError(f"bits_k={bits_k}, bits_v={bits_v} asked for a rolling history: give numbers from 0.25 to 8")
        self.frame, self.sink, self.recent, self.window, self.group = frame, sink, recent, window, group
        self.bits, self.codec, self.interleaved = (bits_k, bits_v), codec, interleaved
        self.clear()

    def clear(self) -> None:
        """Empty, ready for another video."""
        self.groups: list[Packed] = []
        self.first: Pair | None = None  # exact [B, tokens, H, D]
        self.last: Pair | None = None
        self._like: Pair | None = None  # no tokens, of the shape and dtype that this history has
        self.why = ""
        self.error: Tensor | None = None
        self._left = 0  # frames of the first group that have left
        self._coders: list[Coders] = []
        self._queries: Tensor | None = None  # energy [B, H, 1, D] until coders are made

    # -- sizes, in frames

    @property
    def packed(self) -> int:
        return len(self.groups) * self.group - self._left

    @property
    def frames(self) -> int:
        """All that are held."""
        return self.packed + sum(self._count(pair) for pair in (self.first, self.last))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held: walked, not computed."""
        return nbytes([self.first, self.last, self.error, self._queries]) + self.nbytes_packed

    @property
    def nbytes_packed(self) -> int:
        """Those of packed frames, with axes and statistics."""
        coders = {id(coder): coder for made in (self._coders, *(group.coders for group in self.groups)) for pair in made for coder in pair}
        rows = [vars(one) for group in self.groups for pair in group.rows for one in pair]
        return nbytes(rows) + sum(coder.nbytes for coder in coders.values())

    def _count(self, pair: Pair | None) -> int:
        return 0 if pair is None else pair[0].shape[1] // self.frame

    # -- in

    def append(self, k: Tensor, v: Tensor, q: Tensor | None = None) -> None:
        """Whole frames ``k, v [B, n, H, D]`` at the end. ``q [B, n, heads, D]``: their queries, by which keys are weighed until the first
        group is packed."""
        k, v = k.detach(), v.detach()
        self._check(k, v)
        if self._like is None:
            self._like = k.new_empty(len(k), 0, *k.shape[2:]), v.new_empty(len(v), 0, *v.shape[2:])
        if q is not None and not self._coders and self.codec != "exact":
            self._observe(q.detach(), k.shape[2])
        if missing := (self.sink - self._count(self.first)) * self.frame:
            self.first = _joined(self.first, (k[:, :missing], v[:, :missing]))
            k, v = k[:, missing:], v[:, missing:]
        if k.shape[1]:
            self.last = _joined(self.last, (k, v))
        self._evict(self.frames - self.window)
        while self.codec != "exact" and not self.why and self._count(self.last) - self.recent >= self.group:
            self._pack()

    def _check(self, k: Tensor, v: Tensor) -> None:
        if k.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] % self.frame or not k.shape[1]:
            raise TqaiError(
                f"keys {list(k.shape)} and values {list(v.shape)} given: a history takes [batch, tokens, heads, dim] of whole frames of "
                f"{self.frame} tokens"
            )
        for had, new in zip(self._like or (), (k, v), strict=False):
            if (had.dtype, had.shape[0], had.shape[2:]) != (new.dtype, new.shape[0], new.shape[2:]):
                raise TqaiError(
                    f"the history holds {list(had.shape)} of {had.dtype}, got {list(new.shape)} of {new.dtype}: it belongs to another "
                    "model or batch; call clear() or make a new one"
                )

    def _observe(self, q: Tensor, heads: int) -> None:
        energy = sample(q.transpose(1, 2)).float().square().sum(2, keepdim=True).unflatten(1, (heads, -1)).sum(2)
        self._queries = energy if self._queries is None else self._queries + energy

    def _evict(self, extra: int) -> None:
        while extra > 0:
            if self.groups:
                gone = min(extra, self.group - self._left)
                self._left += gone
                if self._left == self.group:
                    self.groups.pop(0)
                    self._left = 0
            else:
                assert self.last is not None
                gone = min(extra, self._count(self.last))
                self.last = _cut(self.last, gone * self.frame)
            extra -= gone

    def _pack(self) -> None:
        """The first frames of the last ones become a group. The device is asked twice: are they finite, and like the ones before?"""
        assert self.last is not None
        if not bool(torch.stack([x.isfinite().all() for pair in (self.first, self.last) if pair is not None for x in pair]).all()):
            self.why = "keys or values hold NaN or inf"
            return
        size = self.group * self.frame
        keys, values = (self._grouped(x[:, :size]) for x in self.last)
        known: list[Coders | None] = [*self._coders] or [None] * len(keys)
        made = [self._coded(row, (keys[row], values[row]), coders) for row, coders in enumerate(known)]
        self.groups.append(Packed([one.groups for one in made], [one.coders for one in made]))
        self._coders, self._queries = self.groups[-1].coders, None
        for one in made:
            self.error = one.error if self.error is None else torch.maximum(self.error, one.error)
        self.last = _cut(self.last, size)

    def _coded(self, row: int, pair: Pair, known: Coders | None) -> Coded:
        """A group of a sequence. It gets coders of its own where those of the one before do badly, and new ones halve the error."""
        before = None if known is None else Coded.of(pair, known)
        if before is not None and not bool((before.wrong > AGAIN * torch.stack([coder.expected for coder in before.coders])).any()):
            return before
        new = Coded.of(pair, self._fit(row, known))
        return new if before is None or bool((2 * new.wrong < before.wrong).any()) else before

    def _fit(self, row: int, known: Coders | None) -> Coders:
        """Coders of a sequence, from the frames of it that are exact."""
        tokens = max(self.window - self.sink - self.recent, self.group) * self.frame
        weight = None if known is None else known[0].weight
        if self._queries is not None:
            weight = pooled(self._queries[row], self.interleaved).sqrt()[:, None]
        made = []
        for which, (bits, weights) in enumerate(zip(self.bits, (weight, None), strict=True)):
            exact = [pair[which][row : row + 1] for pair in (self.first, self.last) if pair is not None]
            size = self.group * self.frame
            whole = [self._grouped(x[:, : x.shape[1] // size * size])[0] for x in exact if x.shape[1] >= size]
            made.append(Transform.fit(torch.cat(whole, 1), bits, tokens, weights))
        return made[0], made[1]

    def _grouped(self, x: Tensor) -> Tensor:
        """``[B, tokens, H, D]`` as groups ``fp32 [B, H, groups x frame, T, D]``."""
        x = x.float().unflatten(1, (-1, self.group, self.frame))
        return x.permute(0, 4, 1, 3, 2, 5).flatten(2, 3)

    # -- out

    def get(self) -> Pair | None:
        """Keys and values of all frames that are held, ``[B, tokens, H, D]`` in the model's dtype, packed ones decoded a group at a time;
        None where there are none."""
        if self._like is None:
            return None
        if not self.groups:
            return _joined(self.first, self.last)
        found = []
        for which, like in enumerate(self._like):
            out = like.new_empty(len(like), self.frames * self.frame, *like.shape[2:])
            front = 0 if self.first is None else self.first[which].shape[1]
            if self.first is not None:
                out[:, :front] = self.first[which]
            if self.last is not None:
                out[:, front + self.packed * self.frame :] = self.last[which]
            for row, own in enumerate(out):
                self._decode(which, row, own[front : front + self.packed * self.frame])
            found.append(out)
        return found[0], found[1]

    def _decode(self, which: int, row: int, out: Tensor) -> None:
        """The packed keys or values of a sequence into ``out [tokens, H, D]``, groups of the same coder together."""
        end = 0
        for _, run in groupby(self.groups, key=lambda group: id(group.coders[row][which])):
            groups, start = list(run), end
            x = groups[0].coders[row][which].decode(*(group.rows[row][which] for group in groups))
            x = x.unflatten(1, (-1, self.frame)).permute(1, 3, 2, 0, 4).flatten(0, 1)  # [frames, P, H, D] from [H, groups, P, T, D]
            end = start + (len(x) - (self._left if start == 0 else 0)) * self.frame
            out[start:end].unflatten(0, (-1, self.frame)).copy_(x[len(x) - (end - start) // self.frame :])


def _joined(held: Pair | None, new: Pair | None) -> Pair:
    """One after the other; what is held alone is no view of a larger tensor."""
    pairs = [pair for pair in (held, new) if pair is not None]
    keys, values = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return keys, values


def _cut(pair: Pair, count: int) -> Pair | None:
    """Without the first ``count`` tokens; a view would keep them alive."""
    return None if count == pair[0].shape[1] else (pair[0][:, count:].clone(), pair[1][:, count:].clone())
