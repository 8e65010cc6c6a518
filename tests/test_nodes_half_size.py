"""The first steps at half the height and width in ComfyUI: on the fake host, and on a real checkout with the trained minis."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tqai_core.half_size import TRUSTED
from tqai_core.metrics import psnr

real = pytest.mark.skipif("TQAI_COMFYUI" not in os.environ, reason="needs a real ComfyUI")
STEPS = 8


@pytest.fixture
def above_half(monkeypatch):
    """Half size for sigmas above .5, whatever random or padded latents show."""
    monkeypatch.setattr("tqai_core.half_size.hidden", lambda powers, size, seen_at, sigma: float(sigma <= 0.5))
    monkeypatch.setattr("tqai_core.half_size.APART", 1e9)
    # the mean power of all channels: ComfyUI's latents of the minis have fifteen more, which hold nothing
    monkeypatch.setattr("tqai_core.half_size._continued", lambda *seen: None)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_few_steps(host, above_half, name):
    m = host.load(name)
    plain = host.sample(m, name, steps=STEPS)
    on = host.compress(m, preset="half")
    host.sample(on, name, steps=STEPS)  # the first run compares the two sizes
    x, report = host.sample(on, name, steps=STEPS), host.report()
    assert 0 < report["calls_half"] < report["calls"]
    assert report["calls_skipped"] == 0
    assert torch.equal(host.sample(on, name, steps=STEPS), x), "a second run is the same"
    assert x.shape == plain.shape
    assert not torch.equal(x, plain)
    assert torch.equal(host.sample(host.compress(m, preset="half", enabled=False), name, steps=STEPS), plain)
    assert torch.equal(host.sample(m, name, steps=STEPS), plain), "the model itself is untouched"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_model_that_does_not_know_half_the_size_stays_exact(host, monkeypatch, name):
    monkeypatch.setattr("tqai_core.half_size.APART", 0.0)
    m = host.load(name)
    plain, on = host.sample(m, name, steps=STEPS), host.compress(m, preset="half")
    for _ in range(2):
        assert torch.equal(host.sample(on, name, steps=STEPS), plain)
    assert host.report()["calls_half"] == 0


@pytest.mark.parametrize(
    ("inputs", "shape", "why"),
    [
        ({"c_concat": torch.zeros(1)}, (1, 4, 16, 16), "c_concat"),
        ({"control": {}}, (1, 4, 16, 16), "control"),
        ({"ref_latents": []}, (1, 4, 16, 16), "ref_latents"),
        ({}, (1, 4, 18, 16), "18 x 16"),
        ({}, (1, 4, 16), "unknown form"),
    ],
)
def test_what_cannot_be_made_smaller_has_full_size(host, inputs, shape, why):
    why_not = host.part("nodes.half_size").why_not
    assert why in (why_not(torch.zeros(shape), {"c_crossattn": torch.zeros(1), "y": None, **inputs}, 2) or "")
    assert why_not(torch.zeros(1, 4, 16, 16), {"c_crossattn": torch.zeros(1), "guidance": 3.5}, 2) is None


@real
@pytest.mark.shows("half size: PSNR between the doors of ComfyUI and diffusers")
@pytest.mark.parametrize("kind", ["flux", "sd3", "wan"])
def test_the_same_as_in_diffusers(host, above_half, kind, record_property):
    import convert
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    import tqai_core as tqai
    from tqai_core.hosts.diffusers import minis

    labels = [3, 7]
    m = host.load(f"mini_{kind}")
    m = m if kind == "flux" else ModelSamplingSD3().patch(m, 1.0, 1000)[0]
    shape = (2, 16, 9, 16, 16) if kind == "wan" else (2, 16, 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def conds(labels: list[int]) -> Any:
        text, pooled = convert.conditioning(kind, labels)
        return [[text, {} if pooled is None else {"pooled_output": pooled}]]

    pipe = minis.pipeline(kind)
    start = noise[:, :1]
    start = pipe._pack_latents(start, 2, 1, 16, 16) if kind == "flux" else start
    options = {"num_inference_steps": STEPS, "latents": start, "output_type": "latent", "return_dict": False}
    with tqai.apply(pipe, tqai.preset("half", kind)) as handle:
        handle.flows[0].half_size.trusted = True
        other = minis.pixels(kind, pipe(**minis.inputs(kind, labels, 2.0), **options)[0])
        there = handle.report()
    TRUSTED[m.model.diffusion_model] = True
    x = host.sample(
        host.compress(m, preset="half"), f"mini_{kind}", steps=STEPS, cfg=2.0, positive=conds(labels), negative=conds([10, 10]),
        noise=noise, sigmas=pipe.scheduler.sigmas.clone(),
    )[:, :1]  # fmt: skip
    figure = psnr(x, other)
    record_property("figure", f"{kind} {figure:.0f} dB")
    assert host.report()["calls_half"] > 0
    assert there.calls_half > 0
    assert figure > 60, "both hosts compute the same"
