"""A causal video model: diffusers' WAN class with attention over blocks of frames, as Self-Forcing (2506.08009) and CausVid (2412.07772).

A block of ``BLOCK`` frames is denoised while it reads the keys and values of clean earlier frames; then it goes through the model once
more, clean and at time 0, and its own keys and values join the history. The history is one object a layer, whatever holds it: ``get()``
gives keys and values ``[B, tokens, H, D]`` before rotary positions, ``append(k, v)`` takes those of new frames. Positions roll: the oldest
frame that is held has position 0, so a video has no last frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tqai_core.hosts.diffusers import minis
from tqai_core.minis import digits

BLOCK, SINK, WINDOW = 4, 4, 32  # frames: of a block, of the first ones that stay, and all that a block sees, itself included
TOKENS = 64  # of a frame
WEIGHTS = Path(__file__).resolve().parents[1] / "minis" / "causal.safetensors"
FROZEN = ("condition_embedder", "attn2", "norm2")  # as the WAN mini has them; no part of the file
EMPTY = digits.CLASSES  # the empty prompt


class History(Protocol):
    """Keys and values of earlier frames of one layer."""

    def get(self) -> tuple[Tensor, Tensor] | None:
        """What is held, ``[B, tokens, H, D]``, None before the first frame."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """New frames at the end."""


class Dense:
    """The history as it is, with the oldest frames behind the sinks dropped: what all others are compared to."""

    def __init__(self, window: int = WINDOW - BLOCK) -> None:
        self.window = window * TOKENS
        self.pair: tuple[Tensor, Tensor] | None = None

    def get(self) -> tuple[Tensor, Tensor] | None:
        return self.pair

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.pair is not None:
            k, v = (torch.cat(both, 1) for both in zip(self.pair, (k, v), strict=True))
        self.pair = k, v
        if (extra := k.shape[1] - self.window) > 0:
            front = SINK * TOKENS
            self.pair = tuple(torch.cat([x[:, :front], x[:, front + extra :]], 1) for x in (k, v))  # type: ignore[assignment]


def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: channels (2i, 2i + 1) of ``x [B, n, H, D]`` turned by ``cos, sin [1, n, 1, D]``."""
    cos, sin = angles
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], -1).flatten(-2) * sin


@dataclass
class Reader:
    """The self-attention of one layer, an attention processor of diffusers."""

    owner: Causal
    history: History | None = None
    see: Callable[[Tensor], None] | None = None  # is shown the queries of frames that are kept

    def __call__(self, attn: Any, hidden: Tensor, *others: Any, **more: Any) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = self._pairs(q, k, v) if self.owner.teaching else self._rolling(q, k, v)
        return attn.to_out[0](out.flatten(2, 3))

    def _rolling(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.history is not None
        held, n = self.history.get(), k.shape[1]
        keys, values = (k, v) if held is None else (torch.cat([old, new], 1) for old, new in zip(held, (k, v), strict=True))
        before = keys.shape[1] - n
        out = attend(turn(q, self.owner.angles(before, before + n)), turn(keys, self.owner.angles(0, before + n)), values)
        if self.owner.keeping:
            if self.see is not None:
                self.see(q)
            self.history.append(k, v)
        return out

    def _pairs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Clean frames, then as many noisy ones: a clean block sees all clean ones up to itself, a noisy one those before it and itself."""
        half, size = q.shape[1] // 2, BLOCK * TOKENS
        angles = self.owner.angles(0, half)
        (q0, q1), (k0, k1), (v0, v1) = (x.split(half, 1) for x in (q, k, v))
        q0, q1, k0, k1 = (turn(x, angles) for x in (q0, q1, k0, k1))
        clean, noisy = [], []
        for a in range(0, half, size):
            b = a + size
            clean.append(attend(q0[:, a:b], k0[:, :b], v0[:, :b]))
            noisy.append(attend(q1[:, a:b], *(torch.cat([x[:, :a], y[:, a:b]], 1) for x, y in ((k0, k1), (v0, v1)))))
        return torch.cat([*clean, *noisy], 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@dataclass
class Causal:
    """The WAN mini with :class:`Reader` as its self-attention."""

    net: Any = field(default_factory=lambda: minis.transformer("wan"))
    teaching: bool = False
    keeping: bool = False

    def __post_init__(self) -> None:
        self.readers = [Reader(self) for _ in self.net.blocks]
        for block, reader in zip(self.net.blocks, self.readers, strict=True):
            block.attn1.set_processor(reader)
        self._cos, self._sin = self.net.rope(torch.empty(1, 1, WINDOW, 16, 16))

    def angles(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self._cos[:, first:last], self._sin[:, first:last]

    def teach(self, clean: Tensor, noisy: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Velocities of ``noisy [B, 1, F, 16, 16]`` at ``sigma [B, blocks]``, each block given the clean frames before it."""
        net, self.teaching = self.net, True
        x = net.patch_embedding(torch.cat([clean, noisy], 2)).flatten(2).transpose(1, 2)
        times = torch.cat([torch.zeros_like(sigma), sigma], 1) * 1000
        time, shifts, prompt, _ = net.condition_embedder(times.flatten(), prompt, None, timestep_seq_len=times.shape[1])
        wide = lambda y: y.repeat_interleave(BLOCK * TOKENS, 1)  # noqa: E731
        shifts = wide(shifts.unflatten(2, (6, -1)))
        for block in net.blocks:
            x = block(x, prompt, shifts, None)
        x, time = x.chunk(2, 1)[1], wide(time).chunk(2, 1)[1]
        shift, scale = (net.scale_shift_table + time.unsqueeze(2)).unbind(2)
        x = net.proj_out(net.norm_out(x) * (1 + scale) + shift)
        self.teaching = False
        return x.unflatten(1, (-1, 8, 8)).unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3).unsqueeze(1)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float, prompt: Tensor) -> Tensor:
        """Of a block ``x [B, 1, BLOCK, 16, 16]``, which reads the histories."""
        return self.net(x, timestep=torch.full((len(x),), sigma * 1000), encoder_hidden_states=prompt, return_dict=False)[0]

    @torch.no_grad()
    def keep(self, x: Tensor, prompt: Tensor) -> None:
        """A clean block joins the histories."""
        self.keeping = True
        self.velocity(x, 0.0, prompt)
        self.keeping = False

    def begin(self, histories: Sequence[History], see: Sequence[Callable[[Tensor], None]] | None = None) -> None:
        """Another video: a new history a layer."""
        for i, (reader, history) in enumerate(zip(self.readers, histories, strict=True)):
            reader.history, reader.see = history, None if see is None else see[i]

    def denoise(self, x: Tensor, prompt: Tensor, steps: int) -> Tensor:
        """A block from noise: plain Euler."""
        for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            x = x + (then - now) * self.velocity(x, now, prompt)
        return x

    def roll(self, noise: Tensor, prompt: Tensor, steps: int) -> Tensor:
        """A video ``[B, 1, F, 16, 16]`` from ``noise`` of its size, block after block."""
        frames = []
        for part in noise.split(BLOCK, 2):
            frames.append(self.denoise(part, prompt, steps))
            self.keep(frames[-1], prompt)
        return torch.cat(frames, 2)


def trained() -> Causal:
    """The trained model; what it shares with the WAN mini is taken from there."""
    model = Causal()
    with safe_open(WEIGHTS, "pt") as file:
        own = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    missing, extra = model.net.load_state_dict(own, strict=False)
    assert not extra, extra
    assert all(any(part in name for part in FROZEN) for name in missing), missing
    return model


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """What a file holds: all that was trained, fp16."""
    return {k: v.half().contiguous() for k, v in net.state_dict().items() if not any(part in k for part in FROZEN)}


def log() -> dict[str, Any]:
    """How the model was trained, and what it draws."""
    return json.loads(WEIGHTS.with_suffix(".json").read_text())
