"""Tokens in tile order from a model's first block to its last: one permutation a call in place of four in every attention.

Blocks know no order of tokens. What does is laid out with them: the rotary tables, and what another model adds to the tokens of
its blocks, as ControlNets do. Where that is there, or a timestep for each token, attentions lay out by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...attention.token_order import TileOrder
from ...families.base import Family
from ...flow import Flow
from ...roles import AttentionForecaster

RASTER = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states", "control_hidden_states")


class Laid:
    """The hooks of one model. ``layout`` is the one of the call under way, None where tokens lie as they came."""

    def __init__(self, model: nn.Module, family: Family, flow: Flow, strategy: AttentionForecaster) -> None:
        self.model, self.flow, self.strategy = model, flow, strategy
        self.layout: TileOrder | None = None
        self.last: TileOrder | None = None  # in which the streams are held
        named = lambda name: model.get_submodule(name)  # noqa: E731
        self.hooks = [named(family.tokens).register_forward_hook(self._tokens), named("norm_out").register_forward_pre_hook(self._back)]
        if family.rope:
            self.hooks.append(named(family.rope).register_forward_hook(self._rope))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def enter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decides for one call; returns its arguments, the places of Flux's tokens laid out."""
        layout = self._fit(kwargs) if self.flow.bypass_reason is None else None
        if layout != self.last:
            for where in list(self.flow.memory):  # what is held lies in the other order
                self.flow.memory.drop(where)
        self.layout = self.last = self.flow.memory.token_order = layout
        ids = kwargs.get("img_ids")
        if layout is not None and isinstance(ids, Tensor):
            return {**kwargs, "img_ids": layout.apply(ids, ids.ndim - 2)}
        return kwargs

    def leave(self) -> None:
        """The call is over, also by an error: nothing outside of calls is laid out."""
        self.layout = None

    def _fit(self, kwargs: Mapping[str, Any]) -> TileOrder | None:
        grid, x, t = self.flow.memory.grid, kwargs.get("hidden_states"), kwargs.get("timestep")
        if not grid or any(kwargs.get(name) is not None for name in RASTER) or getattr(self.model, "_parallel_config", None) is not None:
            return None
        if (isinstance(t, Tensor) and t.ndim > 1) or not isinstance(x, Tensor) or (x.ndim == 3 and x.shape[1] != math.prod(grid)):
            return None
        layout = self.strategy.tile_order(math.prod(grid), grid)
        return None if layout.raster else layout

    def _tokens(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.layout is None:
            return out
        if out.ndim > 3:  # a convolution's [b, c, frames, height, width]
            return self.layout.apply(out.flatten(2), 2).view(out.shape)
        return self.layout.apply(out, 1)

    def _rope(self, module: nn.Module, args: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.layout is None:
            return out
        return tuple(self.layout.apply_rope(table, next(i for i, size in enumerate(table.shape) if size > 1)) for table in out)

    def _back(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.layout is None:
            return None
        return (self.layout.undo(args[0], 1), *args[1:])
