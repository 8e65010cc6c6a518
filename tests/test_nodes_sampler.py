"""TQAI Calibrated Sampler on a ComfyUI."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn


@pytest.fixture
def file(host, sampler_file):
    """Puts a sampler file into models/tqai and names it."""

    def put(name="made", folder="models/tqai", label="models", **over):
        sampler_file(host.folder / folder / f"{name}.json", **over)
        return f"{name}.json [{label}]"

    return put


def sample(host, model, out, *, cfg=4.5, sigmas=None, mask=None):
    import comfy.sample

    own, sampler = out.result[:2]
    noise = host.noise("sd3")
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, own if sigmas is None else sigmas, host.conds("sd3", 1), host.conds("sd3", 2), torch.zeros_like(noise),
        noise_mask=mask, disable_pbar=True, seed=0,
    )  # fmt: skip


def test_it_walks_the_files_steps(host, file):
    from tqai_core.calibrate.sampler import CalibratedSampler

    model = host.load("sd3")
    out = host.run("TQAISampler", model=model, file=file())
    sigmas, _, about = out.result
    assert len(sigmas) == 7
    assert float(sigmas[0]) == 1.0
    assert float(sigmas[-1]) == 0.0
    assert "could not be compared" in about or "match" in about
    with host.forwards(model) as calls:
        first = sample(host, model, out)
    assert sum(calls) == 12, "both branches at six steps"
    assert torch.equal(sample(host, model, out), first), "a second run starts anew"
    euler = sample(host, model, host.run("TQAISampler", model=model, file=file("plain", theta=[[0.0] * 4] * 6)))
    assert not torch.allclose(euler, first, atol=1e-4), "the weights do something"
    assert first.isfinite().all()
    solver = CalibratedSampler.load(host.folder / "models/tqai/made.json").solver()
    assert solver.nodes == pytest.approx(sigmas.tolist(), abs=1e-6)


def test_it_is_the_solver_of_the_core(host, file):
    """Against a loop of our own over the host's denoiser."""
    from tqai_core.calibrate.sampler import CalibratedSampler

    choice = file()
    model = host.load("sd3")
    _, sampler, _ = host.run("TQAISampler", model=model, file=choice).result
    solver = CalibratedSampler.load(host.folder / "models/tqai/made.json").solver()
    denoise = lambda x, sigma: torch.tanh(x) * (1 - sigma.view(-1, 1))

    def wrapped(x, sigma, **extra):
        return denoise(x, sigma)

    wrapped.inner_model = nn.Module()
    x = noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for i, s in enumerate(solver.nodes[:-1]):
        x = solver.step(i, (x - denoise(x, torch.full((2,), s))) / s, x)
    seen = []
    got = sampler.sampler_function(wrapped, noise, torch.tensor(solver.nodes), extra_args={}, callback=lambda d: seen.append(d["i"]))
    assert torch.allclose(got, x, atol=1e-6)
    assert seen == list(range(6))


def test_what_it_refuses(host, file):
    model = host.load("sd3")
    out = host.run("TQAISampler", model=model, file=file())
    with pytest.raises(ValueError, match=r"guidance_scale=9 asked.*3\.6 to 5\.6"):
        sample(host, model, out, cfg=9.0)
    with pytest.raises(ValueError, match="own sigmas output"):
        sample(host, model, out, sigmas=torch.linspace(1, 0, 7))
    with pytest.raises(ValueError, match="own sigmas output"):
        sample(host, model, out, sigmas=out.result[0][2:])
    with pytest.raises(ValueError, match="inpaint"):
        sample(host, model, out, mask=torch.ones(1, 1, 16, 16))
    flux = dict(model_class="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="set cfg to 1"):
        sample(host, model, host.run("TQAISampler", model=model, file=file("flux", **flux)))
    with pytest.raises(ValueError, match="without --difference"):
        host.run("TQAISampler", model=model, file=file("difference", difference="{}"))
    if not host.real:  # no checkpoint of another kind is made for a real one
        with pytest.raises(ValueError, match="flow-matching"):
            host.run("TQAISampler", model=host.load("sdxl"), file=file())


def test_another_model_is_told_by_its_first_layer(host, file):
    from tqai_core.calibrate.sampler import entry_hash

    if host.real:
        model = host.load("sd3")
        name = entry_hash(model.model.diffusion_model)
        assert name is not None
        assert "match" in host.run("TQAISampler", model=model, file=file("known", entry=name)).result[2]
        with pytest.raises(ValueError, match="first-layer weights"):
            host.run("TQAISampler", model=model, file=file("other", entry="f" * 16))
        return
    model = host.load("sd3")
    model.model.diffusion_model.x_embedder = nn.Module()
    model.model.diffusion_model.x_embedder.proj = nn.Linear(4, 4)
    name = entry_hash(model.model.diffusion_model)
    assert "match" in host.run("TQAISampler", model=model, file=file("known", entry=name)).result[2]
    with pytest.raises(ValueError, match="first-layer weights"):
        host.run("TQAISampler", model=model, file=file("other", entry="f" * 16))


def test_files_are_found_and_kept_inside(host, file):
    part = host.part("nodes.sampler")
    choice, given = file(), file("given", "input", "input")
    (host.folder / "input").mkdir(exist_ok=True)
    (host.folder / "input/pipeline.json").write_text(json.dumps({"scorer": None}))
    found = part.listing()
    assert {choice, given} <= set(found)
    assert "pipeline.json [input]" not in found
    cls = host.pack.NODE_CLASS_MAPPINGS["TQAISampler"]
    assert cls.validate_inputs(choice) is True
    assert "no sampler file" in cls.validate_inputs("absent.json [models]")
    assert "outside" in cls.validate_inputs("../../secret.json [models]")
    assert "no sampler file" in cls.validate_inputs(part.EMPTY)
    before = cls.fingerprint_inputs(choice)
    file(steps=8)
    assert cls.fingerprint_inputs(choice) != before
    damaged = host.folder / "models/tqai/damaged.json"
    damaged.write_text(re.sub(r'"nodes"', '"gone"', (host.folder / "models/tqai/made.json").read_text()))
    assert "lacks nodes" in cls.validate_inputs("damaged.json [models]")
    damaged.unlink()
