"""The transformer classes of the installed diffusers whose pipelines use a flow scheduler, and an empty model of each."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

FLOW = re.compile(
    r"FlowMatch|FlowMap|flow_prediction|use_flow_sigmas|UniPCMultistep|(Helios|MiniMaxH3|Piflow)Scheduler|LTXEulerAncestralRF|"
    r"scheduler: SchedulerMixin"
)
NO_DENOISER = {"Transformer2DModel", "MiniMaxMusic3RVQDepthDecoder"}  # named in a pipeline's types alone; an autoregressive decoder
SMALL = ("num_layers", "n_layers", "depth", "num_single_layers", "num_visual_blocks", "num_mmdit_layers", "num_single_dit_layers")
NEEDED: dict[str, dict[str, Any]] = {  # what has no default that works
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [32, 32], "llama_layers": (0, 1)},
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
}


@cache
def flow_transformers() -> dict[str, type[ModelMixin]]:
    """By name: every transformer class of diffusers that a pipeline's or modular pipeline's source names beside a flow scheduler."""
    home = Path(diffusers.__file__).parent
    sources = [path.read_text() for path in home.glob("pipelines/*/*.py")]
    sources += ["".join(path.read_text() for path in folder.glob("*.py")) for folder in home.glob("modular_pipelines/*")]
    words = {word for text in sources if FLOW.search(text) for word in re.findall(r"\w*Transformer\w*|\w+DiT\w*", text)}
    classes = {name: getattr(diffusers, name) for name in words - NO_DENOISER if hasattr(diffusers, name)}
    return {
        name: kind
        for name, kind in sorted(classes.items())
        if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__.startswith("diffusers.models.transformers.")
    }


def empty(kind: type[ModelMixin]) -> nn.Module:
    """A model of the class's own default sizes with few layers and without memory for its weights."""
    known = inspect.signature(kind.__init__).parameters
    few = {name: 1 for name in SMALL if name in known and isinstance(known[name].default, int)}
    with torch.device("meta"):
        return kind(**(few | NEEDED.get(kind.__name__, {})))
