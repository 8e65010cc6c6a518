"""Roles of methods. The classes that a method derives from say what it can do and at which levels it acts.

==========  =====================================================  ==========================================================
stage       diffusion (levels model, block, attention)             caches (level kv)
==========  =====================================================  ==========================================================
scorer      :class:`StepScorer`                                    :class:`TokenScorer`, :class:`LayerScorer`, :class:`BlockScorer`
strategy    :class:`Forecaster`, :class:`AttentionForecaster`      :class:`BlockPredictor`, :class:`TokenSorter`, :class:`BlockReader`
monitor     :class:`StepMonitor`, :class:`EntropyMonitor`          :class:`PackMonitor`
codec       :class:`Codec`                                         :class:`CacheCodec`
==========  =====================================================  ==========================================================

A method's class may derive from one role of each side. A :class:`StepScorer` changes something where a :class:`TolerantMonitor`, a
:class:`ScoredForecaster` or (a :class:`BlockScorer`) an :class:`AttentionForecaster` asks it; elsewhere the report warns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .attention.token_order import TileOrder
from .errors import TqaiError
from .registry import Method, param
from .types import Decision, Packed, Part, Step

STEPS = ("model", "block", "attention")  # levels of diffusion


class History(Protocol):
    """What a method sees of a stream (:class:`memory.Stream`): the values held, and the method's own ``state``."""

    where: Any
    grid: tuple[int, ...]
    step: Step | None
    parts: dict[str, Packed]
    kind: Any
    state: dict[str, Any]

    def value(self, name: str) -> Tensor | None: ...


class Batch(Protocol):
    """Tokens that a cache is about to pack in one layer (:class:`kv.segments.PackBatch`)."""

    k: Tensor  # fp32 [B, H, n, D], as they are stored
    v: Tensor  # fp32 [B, H, n, Dv]
    q: Tensor | None  # fp32 [B, H, group x recent queries, D]; None where an attention hides its queries
    state: dict[str, Any]

    def attention(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def exact_rows(self) -> tuple[Tensor, Tensor, int]: ...

    @property
    def error(self) -> Tensor | None: ...


# -- scorers


class Scorer(Method, role="scorer"):
    """Says what matters."""


class StepScorer(Scorer, levels=STEPS):
    """Importance of tokens and steps of a diffusion model."""

    def score(self, x: Tensor | None, step: Step, stream: History) -> Tensor | float | None:
        """Importance in [0, 1] of the tokens ``x [b, n, d]``: ``[b, n]``, or one number.

        At the gate ``x`` is None, since nothing is computed yet: a number for the coming step, or None, and the mean
        score of the last computed step stands. ``stream.state`` is the scorer's own; tensors kept in it are counted.
        No host synchronisation: what is needed stays on the device.
        """
        raise NotImplementedError


class TokenScorer(Scorer, levels=("kv",)):
    """Importance of the tokens of a cache."""

    recent_queries: ClassVar[int] = 0  # recent queries it looks at

    def weigh(self, batch: Batch) -> Tensor | None:
        """Importance in [0, 1] of the tokens that a cache is about to pack, ``[b, n]``; None where it cannot tell.
        ``batch.state`` is the scorer's own; tensors in it begin with the batch dimension and are counted."""
        raise NotImplementedError


class BlockScorer(TokenScorer):
    """Importance of blocks of keys, by what queries want of them: chooses the blocks that :class:`BlockReader` and
    :class:`AttentionForecaster` read."""

    def mass(self, q: Tensor, k: Tensor, block_q: int | None = None, block_k: int | None = None) -> Tensor:
        """Share of attention of every query block on every key block: ``q, k [b, h, n, d] -> fp32 [b, h, nq, nk]``."""
        raise NotImplementedError


class LayerScorer(Scorer, levels=("kv",)):
    """Importance of the layers of a cache."""

    def finer(self, layer: int, layers: int, share: float) -> tuple[bool, bool]:
        """Whether keys and values of ``layer`` are among the ``share`` of all that matter most: these get one size more."""
        raise NotImplementedError


# -- strategies


@dataclass(frozen=True)
class Strategy(Method, role="strategy"):
    """Predicts a tensor from what is held, and says what to hold."""

    name: ClassVar[str] = "none"
    cfg: str = param(
        "none", "difference = forecast cond - uncond on half of the computed steps", choices=("none", "difference"), kw_only=True
    )

    def check(self, level: str) -> None:
        if level == "kv" and self.cfg != "none":
            raise TqaiError(f"{self.name!r}: cfg={self.cfg} is about guidance, and a language model has none: leave it out at level 'kv'")

    @property
    def span(self) -> int:
        """Level kv: tokens of a block; they are packed together."""
        return 1

    def tiers(self, bits: int) -> tuple[float, int]:
        """Level kv: share of the fine tier and its bits, where the codec has ``bits``: the scorer's best eighth gets one size more."""
        return 0.125, {2: 4, 3: 4}.get(bits, 8)


class Forecaster(Strategy, levels=STEPS):
    """Predicts a stream of a diffusion model from its history and chooses what to hold of it."""

    order: ClassVar[int] = 0  # of the prediction over sigma

    def forecast(self, stream: History, step: Step) -> Tensor | None:
        """The stream's value at ``step`` from what is held, fp32, or None when the history is too short."""
        raise NotImplementedError

    def correction(self, x: Tensor, stream: History, step: Step, skipped: Sequence[tuple[float, float]]) -> Tensor | None:
        """The error of the forecasts since the last value, summed over the ``skipped`` steps as (sigma, width) and judged by the
        new value ``x``; None where nothing is to be corrected."""
        return None

    def plan(self, x: Tensor, score: Tensor | float | None, stream: History, step: Step) -> dict[str, Part]:
        """The parts to hold from now on, given the exact new value ``x``; they replace the old ones."""
        raise NotImplementedError


class ScoredForecaster(Forecaster):
    """Its :meth:`plan` depends on the scores of the tokens."""


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention of one guidance branch at one step, as an :class:`AttentionForecaster` sees it."""

    stream: History  # of the residual
    tiled: bool  # the tokens lie in tile order already
    text_first: bool  # tokens outside of the grid stand before it, else after it
    scorer: BlockScorer | None  # chooses the key blocks; None: the nearest ones
    far_errors: Sequence[float] | None  # what ``signal`` was given at the last computed step
    signal: Callable[[Tensor], None]  # squared errors of this step with and without far field, on the device


class AttentionForecaster(Forecaster, levels=("attention",)):
    """Acts inside attention: a local attention is computed at every step, and the residual full - local is forecast."""

    def local_attention(self, site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, full: Tensor | None = None) -> Tensor:
        """The cheap attention of ``q, k, v [b, h, n, d]``: ``[b, h, n, dv]``. ``full`` is the exact one, given at computed steps."""
        raise NotImplementedError

    def tile_order(self, n: int, grid: tuple[int, ...], text_first: bool = False) -> TileOrder:
        """The order in which ``n`` tokens are cut into blocks."""
        raise NotImplementedError

    @property
    def tiles_once(self) -> bool:
        """Whether tokens are put into tile order once a model call, in place of once an attention."""
        return False


class BlockPredictor(Strategy, levels=("kv",)):
    """Predicts the keys of a block of tokens from a few coefficients for each channel."""

    terms: ClassVar[int] = 1  # coefficients: 1 the mean, 2 the slope too

    def fit(self, k: Tensor) -> Tensor:
        """Coefficients of the blocks of ``k [b, h, n, d]``: ``[b, h, blocks, terms, d]``."""
        raise NotImplementedError


class TokenSorter(Strategy, levels=("kv",)):
    """Sorts tokens into two tiers of bits; without a scorer by the size of their prediction error."""


class BlockReader(Strategy, levels=("kv",)):
    """Reads a part of the packed blocks at a step."""

    def num_blocks(self, blocks: int) -> int:
        """How many of so many blocks a step reads."""
        raise NotImplementedError


# -- monitors


class Monitor(Method, role="monitor"):
    """Closes the loop: compares predictions with the exact values and decides."""


class StepMonitor(Monitor, levels=STEPS):
    """Compares forecasts with the exact values and decides each step once, for all sites and branches."""

    min_steps: int = 0  # shorter schedules are left alone

    def idle(self, step: Step) -> str | None:
        """Why nothing of the generation that begins will be forecast, or None: nothing is watched or held then."""
        if step.total is not None and step.total < self.min_steps:
            return f"{step.total} steps are too few to forecast (min_steps={self.min_steps})"
        return None

    def restart(self, state: dict[str, Any]) -> None:
        """The streams' history was dropped: what was measured on it holds no longer."""

    def fits(self, step: Step, error: float, order: int, state: dict[str, Any]) -> bool:
        """Whether a history of another model, with the ``state`` it was left in, goes on at the computed ``step``, where its forecast
        had this relative ``error``."""
        return False

    def gives_up(self, state: dict[str, Any]) -> str | None:
        """Why the rest of this generation is computed exactly, or None: nothing is watched or held from then on."""
        return None

    def decide(self, step: Step, importance: float | None, order: int, state: dict[str, Any]) -> Decision:
        """Compute or forecast ``step``. ``importance`` is the scorer's for the step, ``order`` the forecaster's."""
        raise NotImplementedError

    def observe(self, step: Step, error: float | None, order: int, state: dict[str, Any]) -> None:
        """``error`` is |forecast - exact| / |exact| over all streams of a computed step, None without a forecast. What the
        host signalled is in ``state`` by its name, as ``state["entropy"]``: a list of floats."""
        raise NotImplementedError


class TolerantMonitor(StepMonitor):
    """Scales its tolerance by the importance of the step: a scorer changes its decisions."""


class EntropyMonitor(StepMonitor):
    """Wants the entropy of a few attentions, head by head, as ``state["entropy"]``: the host measures it."""


class PackMonitor(Monitor, levels=("kv",)):
    """Decides how finely tokens of a cache are held."""

    recent_queries: ClassVar[int] = 0  # recent queries it looks at

    def judge(self, batch: Batch) -> tuple[Decision, float | None]:
        """Whether the tokens that a cache is about to pack are all held in the fine tier (``compute``), and the error that was
        measured, if it was. ``batch.state`` is the monitor's own: plain numbers."""
        raise NotImplementedError


# -- codecs


class Codec(Method, role="codec", levels=STEPS):
    """Tensor <-> packed bytes. ``encode`` reads vectors along the last dimension."""

    def encode(self, x: Tensor) -> Packed:
        raise NotImplementedError

    def encode_stream(self, name: str, x: Tensor) -> Packed:
        """``x`` of the stream ``name`` (``attn.3/out``): a codec may have bases for it."""
        return self.encode(x)

    def decode(self, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError

    def verify(self, packed: Packed) -> None:
        """TqaiError unless the tensors that a file gave are what the shape in its header wants, and decode to finite numbers."""


class CacheCodec(Codec, levels=(*STEPS, "kv")):
    """Also codes the rows of caches."""
