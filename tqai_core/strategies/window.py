"""Attention on a part of the keys, plus the forecast of what the rest adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..attention import dense
from ..attention.blocks import block_means
from ..attention.sparse import block_attention
from ..attention.token_order import TileOrder, local_index
from ..errors import TqaiError
from ..metrics import squares
from ..registry import param
from ..roles import AttentionForecaster, AttentionSite, BlockReader, History
from ..types import Part, Step
from .delta2 import LinearForecast

LONG = 4096  # tokens from which blocks are as large as the kernels like them


@dataclass(frozen=True)
class Window(
    LinearForecast, AttentionForecaster, BlockReader, name="window",
    paper="residual sharing of DiTFastAttn 2406.08552; frozen support and order 1 are ours",
):  # fmt: skip
    """Between full computations attention sees a local window (the nearest blocks of keys, or those that scorer ``bsa`` chooses), the other
    keys through a far field. The residual full - local is forecast over sigma, each token's slope scaled by its fit at the last full
    attention. The support stays as it was first chosen, since a slope has a meaning over one support alone: without far field, order 1
    with a frozen support has .27 of the error of plain order 0 with a support chosen at every step (WAN mini, density .25). Order 0
    takes the support of the last full attention and lets the residual fade as it did; it needs no slope. With blocks by ``bsa`` it has .73
    (WAN) to 5.79 times the error of order 1. The far field of centroids leaves .25 to .31 of the error of none at order 1 (WAN),
    that of clusters .41 to 1.24, though one attention errs less with them.
    Saves a part of the attention alone: skipping whole steps is better where the model allows it.
    At level kv a step reads the exact tokens and ``density`` of the packed blocks, half of them the newest: at 16k tokens and density
    .25 a step takes .59 (nearest blocks) to .92 (``bsa``) of the time, and has 11.6 to 14.0 times the KL of a plain cache of equal bytes on
    the trained LM.
    """

    slope_bits: int = param(3, "bits a coordinate of the slope", low=1, high=8)
    density: float = param(0.25, "part of the key blocks that a query block sees", low=0.0, high=1.0)
    block: int = param(0, "tokens a block; 0 = 16, and from 4096 tokens on 64 keys and 256 queries", low=0, high=1024)
    residual: int = param(1, "order of the residual's forecast: 1 = linear over sigma, 0 = the last one", choices=(0, 1))
    fade: float = param(  # best on seeds 3 to 8 of the WAN mini: least squares of two noisy residuals underestimates what stays
        0.3, "order 0: the part of its fading between the last two full attentions that a residual continues", low=0.0, high=1.0
    )
    frozen: bool = param(
        True, "keep the support of the first full attention (order 1) or the last one (order 0); false = choose anew at every step"
    )
    far: str = param(
        "centroid",
        "far field of the keys that are not seen: the mean of each block and a common first order, the same with means of clusters for "
        "the blocks next in weight, one mean and first order, or nothing",
        choices=("centroid", "clusters", "linear", "none"),
    )
    lay: str = param(
        "layer",
        "layer = tokens are put in tile order in each sparse attention; call = once a model call (diffusers), which changes the last bits",
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
        """How many of ``blocks`` key blocks a block of queries sees; level kv: of the packed blocks a step reads."""
        return min(max(round(self.density * blocks), 1), blocks)

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        value, slope, gain = stream.value("value"), stream.value("slope"), stream.state.get("trend_gain")
        if value is None or gain is None or stream.step is None:
            return super().forecast(stream, step)
        ahead = step.sigma - stream.step.sigma
        if slope is None:
            return value * gain.float().mul_(ahead).add_(1).clamp_min_(0)
        return torch.addcmul(value, slope, gain.float(), value=ahead)

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        stream.state.pop("trend_gain", None)
        value = stream.value("value")
        trend = stream.value("slope") if self.residual else value if self.fade else None
        if value is not None and trend is not None and stream.step is not None and step.sigma != stream.step.sigma:
            # least squares: how far each token's residual has followed its trend since the last full attention
            span = step.sigma - stream.step.sigma
            change = (x.float() - value) / span
            gain = ((change * trend).sum(-1, keepdim=True) / trend.square().sum(-1, keepdim=True).clamp_min(1e-30)).nan_to_num_(0.0)
            # order 0: what it lost it goes on to lose, in part; none grows
            gain = gain.clamp_(0.0, 1.0) if self.residual else (gain * span).clamp_(-1.0, 0.0).mul_(self.fade / span)
            stream.state["trend_gain"] = gain.half()
        return super().plan(x, score, stream, step)

    def blocks(self, n: int) -> tuple[int, int]:
        """Queries and keys a block for ``n`` tokens."""
        return (self.block, self.block) if self.block else (256, 64) if n >= LONG else (16, 16)

    def tile_order(self, n: int, grid: tuple[int, ...], text_first: bool = False) -> TileOrder:
        size = math.prod(grid) if grid else n
        return TileOrder.of(n, self.queries or self.blocks(size)[1], grid, text_first)

    @property
    def tiles_once(self) -> bool:
        return self.lay == "call"

    def local_attention(self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, full: Tensor | None = None) -> Tensor:
        """Attention to the local window, the other keys through the far field. At a computed step the far field is compared with
        its absence; the better of the two is used from the next computed step on."""
        order = self.tile_order(q.shape[-2], site.stream.grid, site.text_first)
        apply = (lambda x: x) if site.tiled else partial(order.apply, dim=2)
        undo = (lambda x: x) if site.tiled else partial(order.undo, dim=2)
        if self.queries:
            return undo(self.means(apply(q), k, v, order))
        block_q, block_k = self.blocks(math.prod(order.grid))
        q, k, v = (apply(x) for x in (q, k, v))
        if full is not None and self.residual == 0:
            site.stream.state.pop("support", None)
        index = self._support(site, q, k, block_q, block_k, order)
        far = self._far_field(site, full is not None)
        out = undo(block_attention(q, k, v, index, block_q, block_k, far))
        if full is not None and self.far != "none":
            other = undo(block_attention(q, k, v, index, block_q, block_k, None if far else self.far))
            site.signal(torch.stack([squares(x, full)[0] for x in ((out, other) if far else (other, out))]))
        return out

    def _far_field(self, site: AttentionSite, computed: bool) -> str | None:
        """The far field that this stream uses: it changes only where a full attention starts the residual anew."""
        if self.far == "none":
            return None
        state, errors = site.stream.state, site.far_errors
        if computed:
            use = errors is None or errors[0] <= errors[1]
            if use != state.get("far", True):
                state.pop("trend_gain", None)
                site.stream.parts.clear()  # a residual over another approximation is no history of this one
            state["far"] = use
        return self.far if state.get("far", True) else None

    def _support(self, site: AttentionSite, q: Tensor, k: Tensor, block_q: int, block_k: int, order: TileOrder) -> Tensor:
        """Key blocks of every query block, ``int64 [b or 1, h or 1, nq, num_blocks]``."""
        held = site.stream.state.get("support")
        if held is not None and self.frozen:
            return held.long()
        blocks = -(-k.shape[-2] // block_k)
        if site.scorer is not None:
            index = site.scorer.mass(q, k, block_q, block_k).topk(self.num_blocks(blocks), dim=-1).indices.sort(-1).values
        else:
            index = local_index(order, block_q, block_k, self.num_blocks(blocks), q.device)
        if self.frozen:
            site.stream.state["support"] = index.short() if blocks < 2**15 else index.int()
        return index

    def means(self, q: Tensor, k: Tensor, v: Tensor, order: TileOrder) -> Tensor:
        """Every tile's output is that of its mean query, ``q`` in tile order; text keeps its own queries."""
        size = math.prod(order.grid)
        first, grid, last = q.split([order.before, size, order.after], 2)
        tiles = block_means(grid, self.queries).to(q.dtype)
        out = dense.attention(torch.cat([first, tiles, last], 2), k, v)
        first, grid, last = out.split([order.before, tiles.shape[2], order.after], 2)
        return torch.cat([first, grid.repeat_interleave(self.queries, 2)[:, :, :size], last], 2)
