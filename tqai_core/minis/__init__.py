"""Three trained miniature diffusion transformers, for the demo, the tests and the benches.

Flux-, SD3- and WAN-class models of diffusers, trained by flow matching on scikit-learn's digits
(benchmarks/minis/train_dit.py); a few MB of fp16 weights each. A class label takes the prompt's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KINDS = ("flux", "sd3", "wan")


def pipeline(kind: str, scheduler: Any = None) -> Any:
    """The real FluxPipeline, StableDiffusion3Pipeline or WanPipeline around the mini, fp32 on the CPU.

    ``scheduler`` is any flow-matching scheduler; FlowMatchEulerDiscreteScheduler(shift=1) without one. Call it as
    ``pipe(**minis.inputs(kind, [3, 7]), num_inference_steps=24)``. Needs diffusers.
    """
    from ..adapters.minis import pipeline

    return pipeline(kind, scheduler)


def inputs(kind: str, labels: Sequence[int], guidance: float = 2.0) -> dict[str, Any]:
    """Keyword arguments that make the pipeline draw ``labels`` (0 to 9), guided by ``guidance``."""
    from ..adapters.minis import inputs

    return inputs(kind, labels, guidance)
