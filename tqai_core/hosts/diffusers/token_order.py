"""Tokens in tile order from a model's first block to its last: one permutation a call in place of four in every attention.

Blocks do not depend on the order of tokens. The rotary tables do and are put into the same order. What another model adds to the
tokens of the blocks (ControlNet) and timesteps for each token are not: with these, each attention orders its tokens by itself.
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


class TokenOrder:
    """The hooks of one model. ``order`` is that of the current call, None where the tokens stay as the model has them."""

    def __init__(self, model: nn.Module, family: Family, flow: Flow, strategy: AttentionForecaster) -> None:
        self.model, self.flow, self.strategy = model, flow, strategy
        self.order: TileOrder | None = None
        self.last: TileOrder | None = None  # in which the streams are held
        named = lambda name: model.get_submodule(name)  # noqa: E731
        self.hooks = [named(family.tokens).register_forward_hook(self._tokens), named("norm_out").register_forward_pre_hook(self._back)]
        if family.rope:
            self.hooks.append(named(family.rope).register_forward_hook(self._rope))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def enter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Decide for one call; returns its arguments, with the positions of Flux's tokens in the same order."""
        order = self._fit(kwargs) if self.flow.bypass_reason is None else None
        if order != self.last:
            for where in list(self.flow.memory):  # what is held lies in the other order
                self.flow.memory.drop(where)
        self.order = self.last = self.flow.memory.token_order = order
        ids = kwargs.get("img_ids")
        if order is not None and isinstance(ids, Tensor):
            return {**kwargs, "img_ids": order.apply(ids, ids.ndim - 2)}
        return kwargs

    def leave(self) -> None:
        """The call is over, also by an error: outside of calls the model keeps its own order."""
        self.order = None

    def _fit(self, kwargs: Mapping[str, Any]) -> TileOrder | None:
        grid, x, t = self.flow.memory.grid, kwargs.get("hidden_states"), kwargs.get("timestep")
        if not grid or any(kwargs.get(name) is not None for name in RASTER) or getattr(self.model, "_parallel_config", None) is not None:
            return None
        if (isinstance(t, Tensor) and t.ndim > 1) or not isinstance(x, Tensor) or (x.ndim == 3 and x.shape[1] != math.prod(grid)):
            return None
        order = self.strategy.tile_order(math.prod(grid), grid)
        return None if order.raster else order

    def _tokens(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.order is None:
            return out
        if out.ndim > 3:  # a convolution's [b, c, frames, height, width]
            return self.order.apply(out.flatten(2), 2).view(out.shape)
        return self.order.apply(out, 1)

    def _rope(self, module: nn.Module, args: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.order is None:
            return out
        return tuple(self.order.apply_rope(table, next(i for i, size in enumerate(table.shape) if size > 1)) for table in out)

    def _back(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.order is None:
            return None
        return (self.order.undo(args[0], 1), *args[1:])
