"""A short name for a model's weights: what calibrated files are tied to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TqaiError

SAMPLES = 64  # values looked at in each parameter


def model_hash(module: nn.Module) -> str:
    """16 hexadecimal digits that name the weights of ``module`` (of transformers, diffusers or plain torch).

    From its class, the integers of its config, each parameter's name and shape, and the signs of 64 values of each,
    evenly spaced. Device and dtype do not count: signs survive a cast to bf16 or fp16. Another model, size or training
    has another hash; a fine-tuning so slight that it turns none of these signs has not. Raises ValueError for a module
    without parameters or with parameters that are not loaded.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    digest = hashlib.sha256(json.dumps([type(module).__name__, _integers(getattr(module, "config", None))]).encode())
    parameters = sorted(module.named_parameters())
    if not parameters:
        raise TqaiError(f"{type(module).__name__} has no parameters to hash: give the model itself")
    for name, x in parameters:
        if x.device.type == "meta":
            raise TqaiError(f"parameter {name!r} of {type(module).__name__} has no values (meta device): load the weights first")
        digest.update(json.dumps([name, list(x.shape)]).encode())
        if x.numel():
            digest.update(signs(x, SAMPLES))
    return digest.hexdigest()[:16]


def signs(x: Tensor, count: int) -> bytes:
    """Signs of ``count`` evenly spaced values: they survive a cast to bf16 or fp16."""
    at = torch.arange(count, device=x.device) * x.numel() // count
    return bytes((x.detach().reshape(-1)[at] < 0).tolist())


def check_model(module: nn.Module, stored: str | None, what: str) -> None:
    """TqaiError unless ``what`` was calibrated on this model: ``stored`` is the hash in its file."""
    if stored != (given := model_hash(module)):
        raise TqaiError(
            f"{what} belongs to model {stored or '(none written)'}, {type(module).__name__} here is {given}: "
            "on another model it is worse than none; run tqai calibrate on this one"
        )


def _integers(config: Any) -> list[list[Any]]:
    """Sizes and counts of a config, sorted by name; what a version or a path may change is left out."""
    if config is None:
        return []
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config) if hasattr(config, "items") else vars(config)
    return sorted([str(k), v] for k, v in items.items() if type(v) is int and not str(k).startswith("_"))
