"""Keys, values and queries of the trained minis along a real trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .harness import Mini


def collect(mini: Mini, labels: Sequence[int], seed: int, steps: int, every: int = 1) -> dict[str, list[Tensor]]:
    """Name ("0/k", "0/v", "0/q") -> one ``[batch, heads, tokens, d]`` fp32 a computed call, cond and uncond in turn.

    Keys and queries are taken after their norm and before the rotary positions; image tokens only where text has its own
    projections.
    """
    model = mini.pipe.transformer
    blocks = [*getattr(model, "transformer_blocks", []), *getattr(model, "single_transformer_blocks", []), *getattr(model, "blocks", [])]
    out: dict[str, list[Tensor]] = {}
    hooks, calls = [], {"n": 0}

    def keep(name: str, heads: int) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> None:
            if calls["n"] % every == 0:
                split = y if y.ndim == 4 else y.unflatten(-1, (heads, -1))
                if split.shape[1] == heads and split.shape[2] != heads:
                    split = split.transpose(1, 2)
                out.setdefault(name, []).append(split.transpose(1, 2).float().contiguous())

        return hook

    for i, block in enumerate(blocks):
        attn = getattr(block, "attn1", None) or block.attn
        heads = attn.heads
        for kind, module in (("k", attn.norm_k), ("q", attn.norm_q), ("v", attn.to_v)):
            hooks.append(module.register_forward_hook(keep(f"{i}/{kind}", heads)))
    hooks.append(blocks[-1].register_forward_hook(lambda *_: calls.__setitem__("n", calls["n"] + 1)))
    try:
        mini.run(labels, seed, steps)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def branch(trajectory: list[Tensor], kind: str) -> list[Tensor]:
    """The conditional half of a stream: every second call where guidance is two calls, half the batch where it is one."""
    return [x.chunk(2)[1] for x in trajectory] if kind == "sd3" else trajectory[::2]
