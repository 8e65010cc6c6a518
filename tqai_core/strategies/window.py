"""Attention on part of the keys, and the rest from the last full one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..attention.sparse import block_attention, local_index
from ..registry import Scorer, param
from ..types import Part, Step
from .delta2 import Line

if TYPE_CHECKING:
    from ..memory import Stream


@dataclass(frozen=True)
class Window(Line, name="window", paper="residual sharing of DiTFastAttn 2406.08552; frozen support and order 1 are ours"):
    """Between full computations attention sees the nearest blocks of keys, or those that scorer ``bsa`` chooses, and the
    residual full - sparse is carried on over sigma, each token's slope as far as it came true at the last full attention. The
    support stays as it was first chosen, since a residual can only be extrapolated over one support: order 1 with a frozen
    support has .42 of the error of order 0 with a support chosen anew (WAN mini, density .25, four full steps, then every third).
    Saves a part of the attention alone: skipping whole steps is better where the model allows it.
    At level kv a step reads the exact tokens and ``density`` of the packed blocks, half of them the newest: at 16k tokens and density
    .25 a step takes half (nearest blocks) to two thirds (``bsa``) of the time, and has 6 times the KL of reading all of a four bit
    cache (.0005 on the trained LM).
    """

    density: float = param(0.25, "part of the key blocks that a query block sees", low=0.0, high=1.0)
    block: int = param(16, "tokens a block", low=4, high=1024)
    residual: int = param(1, "order of the residual's forecast: 1 = linear over sigma, 0 = the last one", choices=(0, 1))
    frozen: bool = param(True, "keep the support of the first computation; false = choose anew at every step")

    levels: ClassVar[tuple[str, ...]] = ("attention", "kv")
    kernel: ClassVar[bool] = True
    terms = 0
    reads = True
    elsewhere = "it acts inside attention"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.residual

    @property
    def span(self) -> int:
        return self.block

    def forecast(self, stream: Stream, step: Step) -> Tensor | None:
        value, slope, trust = stream.value("value"), stream.value("slope"), stream.state.get("trust")
        if value is None or slope is None or trust is None or stream.step is None:
            return super().forecast(stream, step)
        return torch.addcmul(value, slope, trust.float(), value=step.sigma - stream.step.sigma)

    def plan(self, x: Tensor, score: Tensor | float | None, stream: Stream, step: Step) -> dict[str, Part]:
        value, slope = stream.value("value"), stream.value("slope")
        stream.state.pop("trust", None)
        if value is not None and slope is not None and stream.step is not None and step.sigma != stream.step.sigma:
            # how much of each token's slope came true since the last full attention, by least squares
            gone = (x.float() - value) / (step.sigma - stream.step.sigma)
            trust = (gone * slope).sum(-1, keepdim=True) / slope.square().sum(-1, keepdim=True).clamp_min(1e-30)
            stream.state["trust"] = trust.nan_to_num_(0.0).clamp_(0.0, 1.0).half()
        return super().plan(x, score, stream, step)

    def support(self, q: Tensor, k: Tensor, scorer: Scorer | None, stream: Stream, text: tuple[int, int]) -> Tensor:
        """Key blocks of every query block, ``int64 [b or 1, h or 1, nq, kept]``; ``text = (before, after)`` tokens that lie
        outside the grid."""
        held = stream.state.get("support")
        if held is not None and self.frozen:
            return held.long()
        n = k.shape[-2]
        blocks = -(-n // self.block)
        keep = max(round(self.density * blocks), 1)
        if scorer is not None and hasattr(scorer, "mass"):
            index = scorer.mass(q, k, self.block, self.block).topk(keep, dim=-1).indices.sort(-1).values
        else:
            index = local_index(n, self.block, keep, stream.grid, text, q.device)
        if self.frozen:
            stream.state["support"] = index.short() if blocks < 2**15 else index.int()
        return index

    def check(self, level: str) -> None:
        super().check(level)
        if level == "kv" and self.block not in (16, 32, 64):
            raise ValueError(f"'window': block={self.block}; at level 'kv' a block has 16, 32 or 64 tokens: give one of these")

    def kept(self, blocks: int) -> int:
        """Level kv: how many of the packed blocks a step reads."""
        return min(max(round(self.density * blocks), 1), blocks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        """Attention of ``q, k, v [b, h, n, d]`` on the supported blocks."""
        return block_attention(q, k, v, index, self.block, self.block)
