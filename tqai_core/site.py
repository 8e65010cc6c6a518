"""A place of a model that produces tensors, as the flow sees it: the same for every host.

A host makes one :class:`Site` for each block or attention. diffusers runs one guidance branch a call, ComfyUI several in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from .flow import Flow
from .roles import AttentionForecaster
from .types import Where

PROBES = 4  # attentions whose entropy is measured
QUERIES = 16  # sampled for the attention entropy
NO_WINDOW = "a mask or cross-attention: windows are for full self-attention"


class Site:
    """One place in one call of the model.

    A stream is named by its kind: ``out`` (the image), ``out1`` (the text), ``out2`` (an adapter's picture), ``residual`` (full
    minus sparse attention).

    Args:
        flow: asked and told about each tensor.
        name: ``block.3``, ``attn.3``, ``cross.3``.
        branches: guidance branches of the call, in their order along the batch dimension.
        text_first: text comes before the image in joint attention.
        lock: held while the flow is used, for hosts that run branches in several threads.
    """

    sibling: str | None = None  # the branch that ran before in this step, for calls of one branch

    def __init__(
        self, flow: Flow, name: str, branches: Sequence[str] = (), text_first: bool = True, lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self.flow, self.name, self.branches, self.text_first, self.lock = flow, name, branches, text_first, lock or nullcontext()

    def where(self, kind: str, branch: str) -> Where:
        return Where(self.name, branch, kind)

    @property
    def in_attention(self) -> bool:
        """Whether the strategy acts on queries, keys and values and not on outputs."""
        return isinstance(self.flow.strategy, AttentionForecaster)

    def known(self, kinds: Iterable[str]) -> list[str]:
        """Those of ``kinds`` that the first branch has observed, also if they have been given up since."""
        wheres = [self.where(kind, self.branches[0]) for kind in kinds]
        return [w.kind for w in wheres if w in self.flow.memory.streams or w in self.flow.exact]

    def should_skip(self, kind: str, like: Tensor | None = None) -> bool:
        """Whether all branches of ``kind`` are forecast at this step, in the shape of ``like`` if it is given."""
        shape = None if like is None else torch.Size((like.shape[0] // len(self.branches), *like.shape[1:]))
        for where in (self.where(kind, branch) for branch in self.branches):
            if not self.flow.should_skip(where) or (shape is not None and self.flow.memory[where].kind[0] != shape):  # type: ignore[index]
                return False
        return True

    def should_predict_from_sibling(self, kind: str) -> bool:
        flow, branch, sibling = self.flow, self.branches[0], self.sibling
        return sibling is not None and flow.should_predict_from_sibling(self.where(kind, branch), self.where(kind, sibling))

    def forecast(self, kind: str) -> Tensor:
        parts = [self.flow.forecast(self.where(kind, branch), called=_counts(kind)) for branch in self.branches]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def predict_from_sibling(self, kind: str) -> Tensor:
        sibling = self.where(kind, cast(str, self.sibling))
        return self.flow.predict_from_sibling(self.where(kind, self.branches[0]), sibling, called=_counts(kind))

    def compute_instead(self) -> None:
        """The site has no forecast at a step that is to be forecast. Where branches come and go, the rest of the step is computed,
        unless the site never has a forecast."""
        flow = self.flow
        if flow.allow_new_streams and not flow.decision.compute and all(where.site != self.name for where in flow.exact):
            flow.revise("a branch has no history at this step")

    @property
    def unobserved(self) -> bool:
        """Whether the site is exact at a step that is forecast elsewhere, and its tensors are not compared with anything."""
        return self.flow.allow_new_streams and not self.flow.decision.compute

    def observe(self, kind: str, x: Tensor, against: Tensor | None = None) -> None:
        """All branches of ``kind`` were computed. Errors count relative to ``against`` where ``x`` is a part of it."""
        if self.unobserved:
            return
        n = len(self.branches)
        outputs: Sequence[Tensor | None] = [None] * n if against is None else against.chunk(n)
        for branch, part, output in zip(self.branches, x.chunk(n), outputs, strict=True):
            sibling = self.where(kind, self.sibling) if self.sibling else None
            self.flow.observe(self.where(kind, branch), part, sibling, called=_counts(kind), against=output)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, full: Callable[[], Tensor]) -> Tensor:
        """Self-attention of ``q, k, v [b, h, n, d]`` with a strategy that acts in attention: at a forecast step on a part of the
        keys, plus the forecast residual; else ``full()`` ``[b, h, n, d]``, whose difference to the local attention is observed."""
        flow, n = self.flow, len(self.branches)
        with self.lock:
            forecast = self.should_skip("residual")
            if not forecast:
                self.compute_instead()
        out = None if forecast else full()
        if out is not None and self.unobserved:
            return out
        outputs: Sequence[Tensor | None] = [None] * n if out is None else out.chunk(n)
        with self.lock:
            parts = zip(self.branches, q.chunk(n), k.chunk(n), v.chunk(n), outputs, strict=True)
            local = [flow.local_attention(self.where("residual", b), q, k, v, self.text_first, full) for b, q, k, v, full in parts]
            near = torch.cat(local) if n > 1 else local[0]
            if out is None:
                return near + rearrange(self.forecast("residual"), "b n (h d) -> b h n d", h=near.shape[1]).to(near.dtype)
            self.observe("residual", rearrange(out - near, "b h n d -> b n (h d)"), against=out)
        return out

    def measure(self, q: Tensor, k: Tensor) -> None:
        """Signal the entropy of this attention to the monitor."""
        with self.lock:
            self.flow.signal("entropy", entropy(q, k))


def probed(count: int) -> set[int]:
    """Which of ``count`` attentions are measured."""
    return {round(i * (count - 1) / (PROBES - 1)) for i in range(PROBES)} if count else set()


def entropy(q: Tensor, k: Tensor) -> Tensor:
    """Mean attention entropy of every head over a few queries, divided by log(keys): ``fp32 [h]`` in [0, 1]."""
    n, m = q.shape[-2], k.shape[-2]
    rows = torch.linspace(0, n - 1, min(n, QUERIES), device=q.device).round().long()
    weights = (q[:, :, rows].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return -(weights * weights.clamp_min(1e-20).log()).sum(-1).mean((0, 2)) / max(torch.tensor(float(m)).log().item(), 1e-9)


def _counts(kind: str) -> bool:
    """Image and text of one call count once."""
    return kind in ("out", "residual")
