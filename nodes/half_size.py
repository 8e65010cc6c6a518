"""One forward of a ComfyUI model at half the height and width. Knows no host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tqai_core.half_size import reduce, why_full

from .run import Run

# conditions that say nothing of places in the picture
SAFE = {
    "c_crossattn", "y", "guidance", "attention_mask", "num_tokens", "frame_rate", "fps", "clip_fea", "clip_text_pooled", "txt_byt5",
    "text_embedding_mask", "text_embedding_mask_t5", "encoder_hidden_states_t5", "encoder_hidden_states_llama3", "t5xxl_ids",
    "t5xxl_weights", "image_meta_size",
}  # fmt: skip


def why_not(x: Tensor, inputs: Mapping[str, Any], patch: int) -> str | None:
    """Why a forward on ``x`` has full size, or None."""
    others = [name for name, value in inputs.items() if value is not None and name not in SAFE]
    return "its latents have an unknown form" if x.ndim not in (4, 5) else why_full(x.shape[-2:], patch, others)


def sized(run: Run, x: Tensor, t: Tensor, inputs: Mapping[str, Any], compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The picture ``[b, ...]`` that the model predicts at ``x``, from a forward at the size of this step. ``compute`` is the host's."""
    flow, parametrisation = run.flow, run.parametrisation
    state, step = flow.half_size, flow.step
    if step is None or not state.small(step.sigma):
        return compute(x, t)
    if (why := why_not(x, inputs, run.kind.patch)) is not None:
        state.off()
        flow.recorder.fallback(flow.model, f"full size: {why}")
        return compute(x, t)
    latent = parametrisation.latent(x, t)
    small, sigma = reduce(latent, step.sigma)
    clean = compute(*parametrisation.host(small, torch.full_like(t, sigma)))
    if state.judges(step.sigma):
        full = compute(x, t)
        if (why := state.judge(full, clean, step.sigma)) is not None:
            flow.recorder.fallback(flow.model, f"full size: {why}")
        return full
    flow.recorder.report.calls_half += 1
    return (latent - step.sigma * state.velocity(latent, step.sigma, clean, sigma)).to(clean.dtype)
