"""What the modular families share: a pipeline of the blocks that need no text encoder and no decoder, and one way to run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base import tensors

LEFT_OUT = ("text_encoder", "duration")  # blocks, beside the decoders: embeddings and lengths go in, latents come out


def modular(build: Any, blocks: Any, **components: Any) -> Any:
    """``build`` with those of ``blocks`` that are not left out, and with ``components``."""
    for name in [name for name in blocks.sub_blocks if name.startswith("decode") or name.rsplit(".")[-1] in LEFT_OUT]:
        blocks.sub_blocks.pop(name)
    pipe = build(blocks=blocks)
    pipe.update_components(**components)
    for block in _all(blocks):
        if hasattr(block, "progress_bar"):
            block.set_progress_bar_config(disable=True)
    return pipe


def _all(blocks: Any) -> Iterator[Any]:
    yield blocks
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield from _all(block)


def sample_modular(pipe: Any, steps: int | None, seed: int, outputs: tuple[str, ...] = ("latents",), **inputs: Any) -> list[Tensor]:
    """The state's ``outputs`` after a run, float32. ``steps=None`` where ``inputs`` tell the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if steps is not None:
        inputs["num_inference_steps"] = steps
    found = pipe(**inputs, generator=generator, output=list(outputs))
    return tensors([found[name] for name in outputs])
