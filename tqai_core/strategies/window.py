"""Attention on part of the keys, and the rest from the last full one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import dense
from ..attention.sparse import block_attention
from ..attention.token_order import TileOrder, local_index
from ..errors import TqaiError
from ..metrics import squares
from ..registry import param
from ..roles import AttentionForecaster, BlockReader, BlockScorer, History
from .delta2 import LinearForecast

if TYPE_CHECKING:
    from ..flow import Flow
    from ..types import Part, Step, Where

LONG = 4096  # tokens from which blocks are as large as the kernels like them


@dataclass(frozen=True)
class Window(
    LinearForecast,
    AttentionForecaster,
    BlockReader,
    name="window",
    paper="residual sharing of DiTFastAttn 2406.08552; frozen support and order 1 are ours",
):
    """Between full computations attention sees the nearest blocks of keys, or those that scorer ``bsa`` chooses, the others through
    a far field, and the residual full - sparse is carried on over sigma, each token's slope as far as it came true at the last full
    attention. The support stays as it was first chosen, since a slope has a meaning over one support alone: without far field, order 1
    with a frozen support has .27 of the error of plain order 0 with a support chosen at every step (WAN mini, density .25). Order 0
    takes the support of the last full attention and lets the residual fade as it did; it needs no slope. With blocks by ``bsa`` it has .73
    (WAN) to 5.79 times the error of order 1. The far field of centroids leaves .25 to .31 of the error of none at order 1 (WAN).
    Saves a part of the attention alone: skipping whole steps is better where the model allows it.
    At level kv a step reads the exact tokens and ``density`` of the packed blocks, half of them the newest: at 16k tokens and density
    .25 a step takes .59 (nearest blocks) to .92 (``bsa``) of the time, and has 11.6 to 14.0 times the KL of a plain cache of equal bytes on
    the trained LM.
    """

    density: float = param(0.25, "part of the key blocks that a query block sees", low=0.0, high=1.0)
    block: int = param(0, "tokens a block; 0 = 16, and from 4096 tokens on 64 keys and 256 queries", low=0, high=1024)
    residual: int = param(1, "order of the residual's forecast: 1 = linear over sigma, 0 = the last one", choices=(0, 1))
    fade: float = param(  # best on seeds 3 to 8 of the WAN mini: least squares of two noisy residuals tells too little that stays
        0.3, "order 0: part of its fading between the last two full attentions that a residual goes on with", low=0.0, high=1.0
    )
    frozen: bool = param(
        True, "keep the support of the first full attention (order 1) or the last one (order 0); false = choose anew at every step"
    )
    far: str = param(
        "centroid",
        "the keys that are not seen: the mean of each block and a common first order, one mean and first order, or nothing",
        choices=("centroid", "linear", "none"),
    )
    lay: str = param(
        "layer",
        "layer = tiles are laid out in each sparse attention; call = once a model call (diffusers), at the cost of the last bits",
        choices=("layer", "call"),
    )
    queries: int = param(0, "tokens a tile whose mean query sees every key, in place of a window; 0 = off", low=0, high=1024)

    elsewhere = "it acts inside attention"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.residual

    @property
    def span(self) -> int:
        return self.block or 16

    def check(self, level: str) -> None:
        super().check(level)
        if level == "kv" and self.block not in (0, 16, 32, 64):
            raise TqaiError(f"'window': block={self.block}; at level 'kv' a block has 16, 32 or 64 tokens: give one of these")
        if level == "kv" and (self.far, self.queries, self.fade) != (Window.far, Window.queries, Window.fade):
            raise TqaiError(
                f"'window': far={self.far!r}, queries={self.queries}, fade={self.fade:g} act on images and clips, asked at level 'kv': "
                "leave them out"
            )

    def num_blocks(self, blocks: int) -> int:
        """Level kv: how many of the packed blocks a step reads."""
        return min(max(round(self.density * blocks), 1), blocks)

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        value, slope, came = stream.value("value"), stream.value("slope"), stream.state.get("trend_gain")
        if value is None or came is None or stream.step is None:
            return super().forecast(stream, step)
        ahead = step.sigma - stream.step.sigma
        if slope is None:
            return value * came.float().mul_(ahead).add_(1).clamp_min_(0)
        return torch.addcmul(value, slope, came.float(), value=ahead)

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        value, slope = stream.value("value"), stream.value("slope")
        stream.state.pop("trend_gain", None)
        line = slope if self.residual else value if self.fade else None
        if value is not None and line is not None and stream.step is not None and step.sigma != stream.step.sigma:
            # how each token's residual has gone along its slope, or along itself, since the last full attention: least squares
            gone = (x.float() - value) / (step.sigma - stream.step.sigma)
            came = ((gone * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True).clamp_min(1e-30)).nan_to_num_(0.0)
            stream.state["trend_gain"] = (
                came.clamp_(0.0, 1.0) if self.residual else self._fading(came, step.sigma - stream.step.sigma)
            ).half()
        return super().plan(x, score, stream, step)

    def _fading(self, rate: Tensor, span: float) -> Tensor:
        """By sigma: what a residual lost since the last full attention it goes on to lose, in part; none grows."""
        return (rate * span).clamp_(-1.0, 0.0).mul_(self.fade / span)

    def blocks(self, n: int) -> tuple[int, int]:
        """Queries and keys a block for ``n`` tokens."""
        return (self.block, self.block) if self.block else (256, 64) if n >= LONG else (16, 16)

    def layout_of(self, n: int, grid: tuple[int, ...], text_first: bool = False) -> TileOrder:
        """The order in which ``n`` tokens are cut into blocks."""
        size = math.prod(grid) if grid else n
        return TileOrder.of(n, self.queries or self.blocks(size)[1], grid, text_first)

    def near(self, flow: Flow, where: Where, q: Tensor, k: Tensor, v: Tensor, text_first: bool, out: Tensor | None = None) -> Tensor:
        """The cheap attention of ``q, k, v [b, h, n, d]``, to which the residual of the stream ``where`` belongs. ``out`` is the exact one
        at a computed step: there the far field is compared with its absence, and from the next step on the better one is used."""
        stream, n = flow.memory[where], q.shape[-2]
        layout = self.layout_of(n, stream.grid, text_first)
        apply, undo = (
            (lambda x: x, lambda x: x)
            if flow.memory.token_order is not None
            else (lambda x: layout.apply(x, 2), lambda x: layout.undo(x, 2))
        )
        if self.queries:
            return undo(self.means(apply(q), k, v, layout))
        bq, bk = self.blocks(math.prod(layout.grid))
        q, k, v = (apply(x) for x in (q, k, v))
        if out is not None and self.residual == 0:
            stream.state.pop("support", None)
        index = self._support(q, k, bq, bk, flow, stream, layout)
        far = self._far(flow, where, stream, out is not None)
        near = undo(block_attention(q, k, v, index, bq, bk, far))
        if out is not None and self.far != "none":
            other = undo(block_attention(q, k, v, index, bq, bk, None if far else self.far))
            pair = (near, other) if far else (other, near)
            flow.signal(f"far/{where}", torch.stack([squares(x, out)[0] for x in pair]))
        return near

    def _far(self, flow: Flow, where: Where, stream: History, computed: bool) -> str | None:
        """The far field that this stream uses: it changes only where a full attention starts the residual anew."""
        if self.far == "none":
            return None
        if computed:
            words = flow.gate_state.state.get(f"far/{where}")  # squared errors of the last full attention, with and without
            use = words is None or words[0] <= words[1]
            if words is not None:
                flow.recorder.far(flow.model, where, (words[0] / max(words[1], 1e-30)) ** 0.5)
            if use != stream.state.get("far", True):
                stream.state.pop("trend_gain", None)
                stream.parts.clear()  # a residual over another approximation is no history of this one
            stream.state["far"] = use
        return self.far if stream.state.get("far", True) else None

    def _support(self, q: Tensor, k: Tensor, bq: int, bk: int, flow: Flow, stream: History, layout: TileOrder) -> Tensor:
        """Key blocks of every query block, ``int64 [b or 1, h or 1, nq, kept]``."""
        held = stream.state.get("support")
        if held is not None and self.frozen:
            return held.long()
        blocks = -(-k.shape[-2] // bk)
        keep = max(round(self.density * blocks), 1)
        if isinstance(flow.scorer, BlockScorer):
            index = flow.scorer.mass(q, k, bq, bk).topk(keep, dim=-1).indices.sort(-1).values
        else:
            index = local_index(layout, bq, bk, keep, q.device)
        if self.frozen:
            stream.state["support"] = index.short() if blocks < 2**15 else index.int()
        return index

    def means(self, q: Tensor, k: Tensor, v: Tensor, layout: TileOrder) -> Tensor:
        """Every tile's output is that of its mean query, ``q`` in tile order; text keeps its own queries."""
        n = q.shape[-2]
        first, grid, last = q.split([layout.before, n - layout.before - layout.after, layout.after], 2)
        size = grid.shape[2]
        means = torch.nn.functional.pad(grid, (0, 0, 0, -size % self.queries)).unflatten(2, (-1, self.queries)).sum(3, dtype=torch.float32)
        sizes = torch.full((means.shape[2], 1), float(self.queries), device=q.device)
        sizes[-1] -= -size % self.queries
        out = dense.attention(torch.cat([first, (means / sizes).to(q.dtype), last], 2), k, v)
        first, grid, last = out.split([layout.before, means.shape[2], layout.after], 2)
        return torch.cat([first, grid.repeat_interleave(self.queries, 2)[:, :, :size], last], 2)
