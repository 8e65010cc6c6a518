"""Runs where each toy was put into its folder of a copy of tqai_core: every part that must find it without being told.

Started by test_layers.py, in an interpreter of its own; the folder ``tests`` is the argument.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import tqai_core as tqai
from tqai_core.metrics import nmse

STEPS = 12
HALF = "fixed:interval=2,min_steps=1"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.attn = Attention(16, heads=2, dim_head=8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn(torch.tanh(self.linear(hidden_states)))


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 16)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.inlet(hidden_states) * (1 + timestep)
        for layer in self.layers:
            x = layer(x)
        return (x,)


def loop(model: nn.Module) -> Tensor:
    x, out = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for i in range(STEPS):
            out.append(model(hidden_states=x, timestep=torch.tensor(1 - i / STEPS))[0])
    return torch.stack(out)


def check_diffusers() -> None:
    ToyTransformer.__module__ = "toys.check"  # it is run as a script here
    torch.manual_seed(0)
    model = ToyTransformer().eval()
    exact = loop(model)
    for level in ("model", "block", "attention"):
        errors = {}
        for strategy in ("delta2", "toyhalf"):
            with tqai.apply(model, tqai.Config(level=level, strategy=strategy, monitor=HALF), steps=STEPS) as handle:
                errors[strategy] = nmse(loop(model), exact)
            assert handle.report().calls_skipped >= 4, (level, strategy)
        assert 0 < errors["delta2"] < 1e-3 < errors["toyhalf"], (level, errors)
        assert torch.equal(loop(model), exact)
    window = tqai.Config(level="attention", strategy="window:block=2", monitor=HALF, codec="exact")
    with tqai.apply(model, window, steps=STEPS):
        assert 0 < nmse(loop(model), exact) < 1e-3


def check_comfyui(tests: Path) -> None:
    sys.path[1:1] = [str(tests / "comfyui"), str(tests / "fakes")]
    import comfy_fake
    import hosts

    comfy_fake.MODELS["toy"] = comfy_fake.transformer("comfy.ldm.toy.model:ToyModel", "layers"), 16, 1.0
    with hosts.fake("0.33.0", Path.cwd()) as host:
        m = host.load("toy")
        exact = host.sample(m, "toy")
        for level in ("model", "block", "attention"):
            x = host.sample(host.compress(m, host.pipeline(), level=level), "toy")
            report = host.report()
            assert all(site.startswith("toy/") for site in report["per_site"])
            assert report["calls_skipped"] >= 7, level
            assert 0 < nmse(x, exact) < 0.1, level
        preset = host.compress(m, level="block").model_options["transformer_options"]["tqai"].config
        assert preset.monitor == "lyapunov:tau=0.22"
        choices = host.pack.NODE_CLASS_MAPPINGS["TQAIStrategy"].define_schema().inputs[0].options
        assert "toyhalf" in [option.key for option in choices]


def check_language_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
    lm = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(1))
    logits = {}
    for scorer in (None, "toytokens", "palm"):
        config = tqai.Config(level="kv", scorer=scorer, strategy="tiered", codec="turbo:bits=2", protect=0, recent=8, calibrate=32)
        with tqai.apply(lm, config) as handle, torch.no_grad():
            cache = handle.cache()
            lm(ids[:, :-1], past_key_values=cache)
            logits[scorer] = lm(ids[:, -1:], past_key_values=cache).logits
    assert not torch.equal(logits["toytokens"], logits[None]), "the scorer changes nothing"
    assert not torch.equal(logits["toytokens"], logits["palm"])


def check_lists(tests: Path) -> None:
    assert "toy" in tqai.config.FAMILIES
    assert tqai.preset("balanced", family="toy").monitor == "lyapunov:tau=0.22"
    assert tqai.preset("balanced").build()[2].tau == min(tqai.config.TAUS["balanced"].values()) < 0.1, "the strictest of all families"
    sys.path.append(str(tests.parent / "benchmarks"))
    import readme

    assert "ToyTransformer" in readme.families()


if __name__ == "__main__":
    check_lists(Path(sys.argv[1]))
    check_diffusers()
    check_comfyui(Path(sys.argv[1]))
    check_language_model()
    print("all found")
