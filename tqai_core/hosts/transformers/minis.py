"""The trained mini language model, and two variants that compute the same function and are hard to quantise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from ...errors import TqaiError
from ...files import model_config, read_tensors
from ...minis import names

FACTORS = (10.0, 20.0, 35.0, 50.0)  # of the outlier channels, a rotary pair each
BIAS = 40.0  # of the two slowest rotary pairs, which hardly turn


@lru_cache(maxsize=1)
def _file() -> tuple[dict[str, str], dict[str, Tensor]]:
    return read_tensors(names.weights("lm"), what="mini", again="install tqai-core again")


def model(variant: str = "plain") -> Any:
    if variant not in names.LM_VARIANTS:
        raise TqaiError(f"unknown variant {variant!r}; known: {', '.join(names.LM_VARIANTS)}")
    header, weights = _file()
    lm = Qwen2ForCausalLM(Qwen2Config(**model_config(header)))
    lm.load_state_dict({name: w.float() for name, w in weights.items() if name != "held_out"})
    harden(lm, variant)
    return lm.eval().requires_grad_(False)


@torch.no_grad()
def harden(lm: Any, variant: str) -> None:
    """Make a model of Llama's or Qwen2's kind the ``variant`` of itself; "plain" leaves it as it is."""
    if variant == "outlier":
        _outliers(lm)
    elif variant == "bias":
        _bias(lm)


def held_out() -> Tensor:
    return _file()[1]["held_out"].long()


def _outliers(lm: Any, seed: int = 0) -> None:
    """Rotary pairs of the keys times 10 to 50, the queries divided by the same: every score stays what it was."""
    g = torch.Generator().manual_seed(seed)
    d, group = lm.config.hidden_size // lm.config.num_attention_heads, lm.config.num_attention_heads // lm.config.num_key_value_heads
    for layer in lm.model.layers:
        q, k, factor = layer.self_attn.q_proj, layer.self_attn.k_proj, torch.ones(lm.config.num_key_value_heads, 2, d // 2)
        for own in factor:
            own[:, torch.randperm(d // 2, generator=g)[: len(FACTORS)]] = torch.tensor(FACTORS)
        wide = factor.repeat_interleave(group, 0)
        k.weight *= factor.view(-1, 1)
        q.weight /= wide.view(-1, 1)
        if k.bias is not None:
            k.bias *= factor.flatten()
            q.bias /= wide.flatten()


def _bias(lm: Any) -> None:
    """Key biases of +-40, as the first and last layers of Qwen2 have them: nearly one number added to all scores of a query."""
    d = lm.config.hidden_size // lm.config.num_attention_heads
    for layer in lm.model.layers:
        k = layer.self_attn.k_proj
        if k.bias is None:
            k.bias = torch.nn.Parameter(k.weight.new_zeros(len(k.weight)), requires_grad=False)
        bias = k.bias.view(-1, 2, d // 2)
        bias[:, 0, -2:] += BIAS
        bias[:, 1, -2:] -= BIAS
