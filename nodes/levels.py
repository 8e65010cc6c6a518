"""Levels block and attention, and the attention entropy that some monitors want. Knows no host.

ComfyUI hands every block the options of its forward. A marker around each block tells the attention override which block it
is in; what belongs to one forward lies in a :class:`Forward` inside these options, since two forwards may run at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tqai_core.attention import dense
from tqai_core.flow import Flow
from tqai_core.site import entropy
from tqai_core.roles import AttentionForecaster, EntropyMonitor
from tqai_core.types import Where

if TYPE_CHECKING:
    from threading import Lock

FORWARD, BLOCK = "tqai_forward", "tqai_block"
PROBES = 4  # attentions whose entropy is watched


@dataclass
class Forward:
    """One forward of a batch of ``branches``. ``exact`` are numbers of blocks that stay the model's own."""

    flow: Flow
    lock: Lock
    level: str
    family: str
    depth: int
    branches: Sequence[str]
    exact: frozenset[int]
    attentions: Counter[int] = field(default_factory=Counter)  # calls so far, by block; -1: outside any marked block

    def block(self, number: int, args: dict[str, Any], compute: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """A block: what it adds to image and text is forecast. Streams ``out`` (image) and ``out1`` (text)."""
        if self.level != "block" or number in self.exact:
            return compute(args)
        names = [name for name in ("img", "txt") if isinstance(args.get(name), Tensor)]
        site = f"block.{number}"
        with self.lock:
            known = [name for name in names if self._stream(site, _kind(name), 0) is not None]
            if "img" in known and all(self._ready(site, _kind(name), args[name]) for name in known):
                ahead = {n: args[n] + self._recall(site, _kind(n)).to(args[n].dtype) for n in known}
                return {"txt": None, **ahead}  # SD3's last block throws its text away
            self._revise(site)
        before = {name: args[name].clone() for name in names}  # newer blocks add in place
        out = compute(args)
        with self.lock:
            for name in names:
                if isinstance(out.get(name), Tensor) and not _same(out[name], before[name]):
                    self._observe(site, _kind(name), out[name] - before[name])
        return out

    def attend(
        self, number: int | None, compute: Callable[[], Tensor], split: Callable[[], _Heads | None], fast: Callable[[], Tensor]
    ) -> Tensor:
        """One attention call inside block ``number``. ``split`` gives ``q, k, v [b, h, n, d]`` where they are wanted; ``compute`` is the
        host's own attention, ``fast`` within the rounding of it."""
        with self.lock:
            nth = self.attentions[-1 if number is None else number]
            self.attentions[-1 if number is None else number] += 1
        if number is None:
            if self.level == "attention":
                self.flow.recorder.fallback(self.family, "attention outside the blocks that tqai marked: computed exactly")
            return compute()
        site = f"{self._name(nth)}.{number}"
        if nth == 0 and self._probes(number):
            self._measure(split())
        if self.level != "attention" or number in self.exact:
            return compute()
        if isinstance(self.flow.strategy, AttentionForecaster):
            heads = split()
            if heads is None or heads.q.shape[-2] != heads.k.shape[-2]:
                self.flow.recorder.fallback(f"{self.family}/{site}", "a mask or cross-attention: windows are for full self-attention")
                return compute()
            return self._sparse(site, heads, fast)
        with self.lock:
            if all(self._skips(site, "out", i) for i in range(len(self.branches))):
                return self._recall(site, "out")
            self._revise(site)
        out = fast()
        with self.lock:
            self._observe(site, "out", out)
        return out

    def _sparse(self, site: str, heads: _Heads, compute: Callable[[], Tensor]) -> Tensor:
        """Attention on part of the keys, and the residual from the last full one. Each branch has a support of its own."""
        flow, n = self.flow, len(self.branches)
        with self.lock:
            forecast = all(self._skips(site, "residual", i) for i in range(n))
            if not forecast:
                self._revise(site)
        out = None if forecast else compute()
        if out is not None and not flow.decision.compute:  # a site that stays exact, at a forecast step
            return out
        truths: Sequence[Tensor | None] = [None] * n if out is None else heads.split(out).chunk(n)
        near = []
        with self.lock:
            for i, (q, k, v) in enumerate(zip(heads.q.chunk(n), heads.k.chunk(n), heads.v.chunk(n), strict=True)):
                near.append(flow.local_attention(self._where(site, "residual", i), q, k, v, True, truths[i]))
            flat = heads.flat(torch.cat(near))
            if out is None:
                return flat + heads.shaped(self._recall(site, "residual")).to(flat.dtype)
            self._observe(site, "residual", heads.tokens(out - flat), against=heads.tokens(out))
        return out

    def _name(self, nth: int) -> str:
        if nth == 0:
            return "attn"
        kind = "cross" if self.family == "wan" else "attn2"
        return kind if nth == 1 else f"{kind}.{nth}"

    def _probes(self, number: int) -> bool:
        if not isinstance(self.flow.monitor, EntropyMonitor) or not self.flow.decision.compute:
            return False
        return number in {round(i * (self.depth - 1) / (PROBES - 1)) for i in range(PROBES)}

    def _measure(self, heads: _Heads | None) -> None:
        if heads is None:
            self.flow.recorder.fallback(self.family, "a masked attention: its entropy is not measured")
            return
        with self.lock:
            self.flow.signal("entropy", entropy(heads.q, heads.k))

    def _where(self, site: str, kind: str, branch: int) -> Where:
        return Where(site, self.branches[branch], kind)

    def _stream(self, site: str, kind: str, branch: int) -> Any:
        return self.flow.memory.streams.get(self._where(site, kind, branch))

    def _skips(self, site: str, kind: str, branch: int) -> bool:
        return self.flow.should_skip(self._where(site, kind, branch))

    def _ready(self, site: str, kind: str, x: Tensor) -> bool:
        n = len(self.branches)
        shape = torch.Size((x.shape[0] // n, *x.shape[1:]))
        return all(self._skips(site, kind, i) and self._stream(site, kind, i).kind[0] == shape for i in range(n))

    def _revise(self, site: str) -> None:
        """A site that has no forecast at a forecast step: the rest of the step is computed, unless it never has one."""
        wheres = [w for w in self.flow.exact if w.site == site]
        if not self.flow.decision.compute and not wheres:
            self.flow.revise("a branch has no history at this step")

    def _recall(self, site: str, kind: str) -> Tensor:
        parts = [self.flow.forecast(self._where(site, kind, i), called=_called(kind)) for i in range(len(self.branches))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _observe(self, site: str, kind: str, x: Tensor, against: Tensor | None = None) -> None:
        if not self.flow.decision.compute:  # a site that stays exact, at a forecast step
            return
        n = len(self.branches)
        truths: Iterable[Tensor | None] = [None] * n if against is None else against.chunk(n)
        for i, (part, truth) in enumerate(zip(x.chunk(n), truths, strict=True)):
            self.flow.observe(self._where(site, kind, i), part, called=_called(kind), against=truth)


@dataclass
class _Heads:
    """``q, k, v [b, h, n, d]`` of a call, and the way back to the layout in which the host wants its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    headed: bool  # the output is wanted as [b, h, n, d], else [b, n, h d]

    def flat(self, x: Tensor) -> Tensor:
        return x if self.headed else x.transpose(1, 2).flatten(2)

    def tokens(self, x: Tensor) -> Tensor:
        """The host's layout -> ``[b, n, h d]``, which is what is held."""
        return x.transpose(1, 2).flatten(2) if self.headed else x

    def split(self, x: Tensor) -> Tensor:
        """The host's layout -> ``[b, h, n, d]``."""
        return x if self.headed else x.unflatten(-1, (self.q.shape[1], -1)).transpose(1, 2)

    def shaped(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.q.shape[1], -1)).transpose(1, 2) if self.headed else x


def marker(number: int, before: Any) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """A replacement for ``patches_replace`` around a block, or around the replacement that was there ``before``."""

    def around(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        forward = options.get(FORWARD)

        def compute(args: dict[str, Any]) -> dict[str, Any]:
            return before(args, extra) if before is not None else extra["original_block"](args)

        if forward is None:
            return compute(args)
        outer = options.get(BLOCK)
        options[BLOCK] = number
        try:
            return _in_block(forward, number, args, compute) if forward.level == "block" else compute(args)
        finally:
            options[BLOCK] = outer

    return around


@torch.compiler.disable
def _in_block(forward: Forward, number: int, args: dict[str, Any], compute: Any) -> dict[str, Any]:
    return forward.block(number, args, compute)


def override(before: Any) -> Callable[..., Tensor]:
    """An attention override, in front of the one that was there ``before``. The host's arguments go on as they came."""

    @torch.compiler.disable  # counting in Python would recompile at every block
    def tqai_attention(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        def compute() -> Tensor:
            return before(func, *args, **kwargs) if before is not None else func(*args, **kwargs)

        options = kwargs.get("transformer_options") or {}
        forward = options.get(FORWARD)
        if forward is None:
            return compute()

        def fast() -> Tensor:
            """Products in place of torch's fused attention; another attention that the user or a node chose stays."""
            if before is None and getattr(func, "__name__", "") == "attention_pytorch" and kwargs.get("scale") is None:
                heads = _heads(args, kwargs)
                if heads is not None and dense.wanted(heads.q, heads.k, heads.v):
                    return heads.flat(dense.attention(heads.q, heads.k, heads.v))
            return compute()

        return forward.attend(options.get(BLOCK), compute, lambda: _heads(args, kwargs), fast)

    return tqai_attention


def _heads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Heads | None:
    """None where a mask or shared key heads make it another attention."""
    q, k, v = args[:3]
    heads = args[3] if len(args) > 3 else kwargs["heads"]
    mask = args[4] if len(args) > 4 else kwargs.get("mask")
    if mask is not None or kwargs.get("enable_gqa", False):
        return None
    if not kwargs.get("skip_reshape", False):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return _Heads(q, k, v, bool(kwargs.get("skip_output_reshape", False)))


def _kind(name: str) -> str:
    return "out" if name == "img" else "out1"


def _called(kind: str) -> bool:
    return kind != "out1"  # image and text of one call count once


def _same(a: Tensor, b: Tensor) -> bool:
    """Text that a block hands through (WAN's prompt) is no output of it."""
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
