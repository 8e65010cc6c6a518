"""Levels block and attention, and the attention entropy that some monitors want. Knows no host.

ComfyUI hands every block the options of its forward. A marker around each block tells the attention override which block it
is in; what belongs to one forward lies in a :class:`Forward` inside these options, since two forwards may run at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tqai_core.attention import dense
from tqai_core.flow import Flow
from tqai_core.roles import EntropyMonitor
from tqai_core.site import NO_WINDOW, Site, probed

FORWARD, BLOCK = "tqai_forward", "tqai_block"


@dataclass
class Forward:
    """One forward of a batch of ``branches``.

    Attributes:
        lock: held while the flow is used.
        second_attention: kind of a block's second attention, as in ``Family``.
        depth: number of the model's blocks; ``exact`` are the numbers of those that stay exact.
        numbered: blocks cannot be marked, but the host tells their numbers.
        attentions: attention calls so far in each block (-1: outside of the marked blocks).
    """

    flow: Flow
    lock: AbstractContextManager[Any]
    level: str
    second_attention: str
    depth: int
    branches: Sequence[str]
    exact: frozenset[int]
    numbered: bool = False
    attentions: Counter[int] = field(default_factory=Counter)

    def site(self, name: str) -> Site:
        return Site(self.flow, name, self.branches, lock=self.lock)

    @torch.compiler.disable
    def block(self, number: int, args: dict[str, Any], compute: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """A block: what it adds to image, text and sound is forecast."""
        if self.level != "block" or number in self.exact:
            return compute(args)
        site, inputs = self.site(f"block.{number}"), _parts(args)
        with self.lock:
            known = site.known(inputs)
            if "out" in known and all(site.should_skip(kind, inputs[kind]) for kind in known):
                forecast = {kind: inputs[kind] + site.forecast(kind).to(inputs[kind].dtype) for kind in known}
                picture = forecast["out"] if isinstance(args["img"], Tensor) else (forecast["out"], forecast["out2"])
                return {"img": picture, "txt": forecast.get("out1")}  # SD3's last block throws its text away
            site.compute_instead()
        before = {kind: x.clone() for kind, x in inputs.items()}  # newer blocks add in place
        out = compute(args)
        with self.lock:
            for kind, x in _parts(out).items():
                if kind in before:
                    site.observe(kind, x - before[kind])
        return out

    def attend(
        self, number: int | None, compute: Callable[[], Tensor], split: Callable[[], Heads | None], fast: Callable[[], Tensor]
    ) -> Tensor:
        """One attention call inside block ``number``. ``split`` gives ``q, k, v`` where they are wanted; ``compute`` is the host's own
        attention, ``fast`` within the rounding of it."""
        place = -1 if number is None else number
        with self.lock:
            nth = self.attentions[place]
            self.attentions[place] += 1
        if number is None:
            if self.level == "attention":
                self._fallback("", "attention outside the blocks that tqai marked: computed exactly")
            return compute()
        kind = "attn" if nth == 0 else self.second_attention if nth == 1 else f"{self.second_attention}.{nth}"
        site = self.site(f"{kind}.{number}")
        measures = isinstance(self.flow.monitor, EntropyMonitor) and self.flow.decision.compute
        if nth == 0 and measures and number in probed(self.depth):
            heads = split()
            if heads is None:
                self._fallback("", "a masked attention: its entropy is not measured")
            else:
                site.measure(heads.q, heads.k)
        if self.level != "attention" or number in self.exact:
            return compute()
        if site.in_attention:
            heads = split()
            if heads is None or heads.q.shape[-2] != heads.k.shape[-2]:
                self._fallback(f"/{site.name}", NO_WINDOW)
                return compute()
            return heads.flat(site.attend(heads.q, heads.k, heads.v, lambda: heads.split(fast())))
        with self.lock:
            if site.should_skip("out"):
                return site.forecast("out")
            site.compute_instead()
        out = fast()
        with self.lock:
            site.observe("out", out)
        return out

    def _fallback(self, where: str, why: str) -> None:
        self.flow.recorder.fallback(f"{self.flow.model}{where}", why)


@dataclass
class Heads:
    """``q, k, v [b, h, n, d]`` of a call, and the way back to the layout in which the host wants its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    headed: bool  # the output is wanted as [b, h, n, d], else [b, n, h d]

    def flat(self, x: Tensor) -> Tensor:
        """``[b, h, n, d]`` -> the host's layout."""
        return x if self.headed else rearrange(x, "b h n d -> b n (h d)")

    def split(self, x: Tensor) -> Tensor:
        """The host's layout -> ``[b, h, n, d]``."""
        return x if self.headed else rearrange(x, "b n (h d) -> b h n d", h=self.q.shape[1])


def marker(number: int, before: Any) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """A replacement for ``patches_replace`` around a block, or around the replacement that was there ``before``."""

    def around(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        forward = options.get(FORWARD)
        compute = extra["original_block"] if before is None else lambda args: before(args, extra)
        if forward is None:
            return compute(args)
        outer = options.get(BLOCK)
        options[BLOCK] = number
        try:
            return forward.block(number, args, compute) if forward.level == "block" else compute(args)
        finally:
            options[BLOCK] = outer

    return around


def override(before: Any) -> Callable[..., Tensor]:
    """An attention override, in front of the one that was there ``before``. The host's arguments go on as they came."""

    @torch.compiler.disable  # counting in Python would recompile at every block
    def tqai_attention(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        compute = partial(func, *args, **kwargs) if before is None else partial(before, func, *args, **kwargs)
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

        number = options.get("block_index") if forward.numbered else options.get(BLOCK)
        return forward.attend(number, compute, lambda: _heads(args, kwargs), fast)

    return tqai_attention


def _parts(values: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a block by the names of their streams: ``out`` picture or video, ``out2`` the sound beside it, ``out1`` text."""
    picture = values.get("img")
    parts = dict(zip(("out", "out2"), picture if isinstance(picture, (tuple, list)) else (picture,), strict=False))
    return {kind: x for kind, x in {**parts, "out1": values.get("txt")}.items() if isinstance(x, Tensor)}


def _heads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Heads | None:
    """None where a mask or shared key heads make it another attention."""
    q, k, v = args[:3]
    heads = args[3] if len(args) > 3 else kwargs["heads"]
    mask = args[4] if len(args) > 4 else kwargs.get("mask")
    if mask is not None or kwargs.get("enable_gqa", False):
        return None
    if not kwargs.get("skip_reshape", False):
        # [b, n, h d], or from some models [b, n, h, d]
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return Heads(q, k, v, bool(kwargs.get("skip_output_reshape", False)))
