"""How keys and values follow from the inputs of an attention of diffusers: its projections, its norm, rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of some tokens: for each axis a table of the positions that occur, ``complex64 [positions, pairs]``, and the
    row of each token in it. Far smaller than an angle for each token and pair, and the same numbers."""

    tables: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]

    @staticmethod
    def of(angles: Any, first: int, count: int, pairs: Sequence[int]) -> Rotary:
        """``angles``: complex ``[tokens, pairs]``, or cosines and sines with each twice, as the blocks of a transformer get them;
        ``pairs`` of each axis."""
        if not isinstance(angles, Tensor):
            angles = torch.complex(*(x[..., ::2].float() for x in angles))
        found = [torch.unique(torch.view_as_real(x.contiguous()).flatten(1), dim=0, return_inverse=True)
                 for x in angles[first : first + count].split(list(pairs), 1)]  # fmt: skip
        tables = tuple(torch.view_as_complex(table.unflatten(1, (-1, 2))) for table, _ in found)
        return Rotary(tables, tuple(rows.to(_least(len(table))) for table, (_, rows) in zip(tables, found, strict=True)))

    def turn(self, k: Tensor, first: int) -> Tensor:
        """``k [B, n, H, D]`` of the tokens from number ``first`` on."""
        rows = [x[first : first + k.shape[1]].long() for x in self.rows]
        angles = torch.cat([table[own] for table, own in zip(self.tables, rows, strict=True)], 1)
        turned = torch.view_as_complex(k.float().unflatten(-1, (-1, 2))) * angles[:, None]
        return torch.view_as_real(turned).flatten(3).to(k.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.tables, *self.rows]


def _least(count: int) -> torch.dtype:
    """The smallest type that has ``count`` numbers."""
    return torch.uint8 if count <= 256 else torch.int16 if count < 2**15 else torch.int32


@dataclass(frozen=True)
class Projection:
    """From the inputs of ``attention`` to the keys and values that its processor stores."""

    attention: Any
    rotary: Rotary

    @torch.no_grad()
    def __call__(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        attention, width = self.attention, self.attention.inner_dim
        joint = getattr(attention, "to_qkv_mlp_proj", None) or (
            attention.to_qkv if getattr(attention, "fused_projections", False) else None
        )
        if joint is None:
            k, v = (_outputs(module, x) for module in (attention.to_k, attention.to_v))
        else:
            k, v = _outputs(joint, x, width, 3 * width).chunk(2, -1)
        k, v = (part.unflatten(-1, (-1, width // attention.heads)) for part in (k, v))
        return self.rotary.turn(attention.norm_k(k).to(v.dtype), first), v


def _outputs(module: Any, x: Tensor, a: int = 0, b: int | None = None) -> Tensor:
    """The outputs ``a`` to ``b`` of a projection; of a plain one no others are computed."""
    changed = "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks  # offloaded by parts, watched
    if type(module) is not nn.Linear or changed or not module.weight.is_floating_point():
        return module(x)[..., a:b]  # adapters and quantised weights too
    return F.linear(x, module.weight[a:b].to(x.dtype), None if module.bias is None else module.bias[a:b].to(x.dtype))
