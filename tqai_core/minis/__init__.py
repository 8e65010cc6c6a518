"""Trained miniature models for the demo, the tests and the benches: four diffusion transformers and a language model.

Flux-, SD3-, WAN- and Z-Image-class models of diffusers, trained by flow matching on scikit-learn's digits
(benchmarks/minis/train_dit.py); a few MB of fp16 weights each. A class label takes the prompt's place. The language model
is a Qwen2 of transformers that reads bytes, trained on Python's standard library (benchmarks/minis/train_lm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .names import KINDS, LM_VARIANTS, UNTUNED

__all__ = ["KINDS", "LM_VARIANTS", "UNTUNED", "inputs", "lm", "lm_text", "pipeline"]


def pipeline(kind: str, scheduler: Any = None) -> Any:
    """The real FluxPipeline, StableDiffusion3Pipeline, WanPipeline or ZImagePipeline around the mini, fp32 on the CPU.

    ``scheduler`` is any flow-matching scheduler; FlowMatchEulerDiscreteScheduler(shift=1) without one. Call it as
    ``pipe(**minis.inputs(kind, [3, 7]), num_inference_steps=24)``. Needs diffusers.
    """
    from ..hosts.diffusers.minis import pipeline

    return pipeline(kind, scheduler)


def inputs(kind: str, labels: Sequence[int], guidance: float | None = None) -> dict[str, Any]:
    """Keyword arguments that make the pipeline draw ``labels`` (0 to 9), guided by ``guidance`` (2 where it is left out)."""
    from ..hosts.diffusers.minis import inputs

    return inputs(kind, labels, guidance)


def lm(variant: str = "plain") -> Any:
    """The byte-level Qwen2ForCausalLM (3 million parameters, 4 layers, 4 query and 2 key heads of 64), fp32 in eval mode.

    Tokens are bytes: ``torch.tensor([list(b"def ")])``. ``outlier`` and ``bias`` compute the same function with key channels
    10 to 50 times as large, or key biases of +-40, as large models have them. Needs transformers.
    """
    from ..hosts.transformers.minis import model

    return model(variant)


def lm_text() -> Any:
    """128 KiB of source code that the language model was not trained on, ``int64 [131072]``."""
    from ..hosts.transformers.minis import held_out

    return held_out()
