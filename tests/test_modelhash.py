from __future__ import annotations

import copy

import pytest
import torch
from bench.bases import calibrate
from torch import nn

from tqai_core.codecs import bases
from tqai_core.hosts.diffusers import minis
from tqai_core.modelhash import model_hash


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16))


def test_one_model_one_hash_whatever_its_dtype_and_layout():
    net = small()
    name = model_hash(net)
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert model_hash(small()) == name
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert model_hash(copy.deepcopy(net).to(dtype)) == name
    frozen = copy.deepcopy(net).requires_grad_(False)
    frozen[0].weight.data = frozen[0].weight.data.T.contiguous().T
    assert model_hash(frozen) == name
    assert model_hash(torch.compile(net)) == name


def test_another_model_has_another_hash():
    wider = nn.Sequential(nn.Linear(16, 65), nn.LayerNorm(65), nn.Linear(65, 16))
    trained = small()
    before = model_hash(trained)
    optimiser = torch.optim.SGD(trained.parameters(), lr=1.0)
    trained(torch.randn(8, 16)).square().mean().backward()
    optimiser.step()
    assert len({before, model_hash(trained), model_hash(small(1)), model_hash(wider)}) == 4


@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_diffusers_modules_and_their_config(kind):
    net = minis.pipeline(kind).transformer
    assert model_hash(net) == model_hash(minis.pipeline(kind).transformer)
    assert model_hash(copy.deepcopy(net).bfloat16()) == model_hash(net)
    assert model_hash(net) != model_hash(next(part for part in net.children() if any(True for _ in part.parameters())))


def test_transformers_modules_differ_by_heads_alone():
    transformers = pytest.importorskip("transformers")

    def make(heads: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads
        )
        return transformers.LlamaForCausalLM(config)

    assert model_hash(make(2)) == model_hash(make(2)) == model_hash(make(2).bfloat16())
    assert model_hash(make(2)) != model_hash(make(4)), "same parameters, other heads"


def test_what_cannot_be_hashed_says_why():
    with pytest.raises(ValueError, match="meta"):
        model_hash(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="no parameters"):
        model_hash(nn.ReLU())


def test_bases_are_refused_for_another_model(tmp_path):
    path = str(tmp_path / "bases.safetensors")
    samples = {"0/k": torch.randn(1, 400, 32)}
    file, _ = calibrate(samples, 4, model=small())
    file.save(path)
    assert bases.load(path, small()).model == model_hash(small())
    assert bases.load(path).bits == 4, "nobody asked"
    with pytest.raises(ValueError, match=f"{model_hash(small())}.*{model_hash(small(1))}"):
        bases.load(path, small(1))
    anonymous, _ = calibrate(samples, 4)
    anonymous.save(path)
    with pytest.raises(ValueError, match="none written"):
        bases.BasesFile.load(path).check(small())
