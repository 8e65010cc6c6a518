"""Which models are flows, and what a forecast velocity becomes: judged by the very class that reads the model's output."""

from __future__ import annotations

import pytest
import torch

CASES = ("CONST", "COSMOS_RFLOW")


class Patcher:
    """What the parametrisation is told of: a model and its sampling."""

    def __init__(self, sampling):
        self.model, self.sampling = type("Model", (), {"model_config": type("SD15", (), {})()})(), sampling

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.sampling


@pytest.fixture
def sampling(host):
    """Makes a sampling of one of the host's classes, or of one that derives from it, with sigmas up to ``highest``."""
    import comfy.model_sampling

    return lambda kind, highest=1.0, **methods: type("Own", (getattr(comfy.model_sampling, kind),), {"sigma_max": highest, **methods})()


@pytest.mark.parametrize("kind", CASES)
def test_velocity_and_denoised_are_each_others_reverse(host, sampling, kind):
    """And they are those of the host: its picture of an output is ours of that velocity."""
    part, made = host.part("nodes.parametrisation"), sampling(kind, 80.0 if kind == "COSMOS_RFLOW" else 1.0)
    flow = part.of(Patcher(made))
    g = torch.Generator().manual_seed(0)
    x, out = (torch.randn(2, 4, 6, 6, generator=g) for _ in range(2))
    for sigma in (torch.tensor([0.9, 0.9]), torch.tensor([0.3, 0.7])):
        denoised = made.calculate_denoised(sigma, out, x)
        torch.testing.assert_close(flow.denoised(x, sigma, out), denoised, rtol=0, atol=2e-6)
        torch.testing.assert_close(flow.velocity(x, sigma, denoised), out, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", CASES)
def test_an_euler_step_of_the_host_is_one_of_the_flow(host, sampling, kind):
    """So errors of a forecast add up in the flow's time, whatever the host's sigma is."""
    flow = host.part("nodes.parametrisation").of(Patcher(sampling(kind)))
    g = torch.Generator().manual_seed(1)
    x, velocity = (torch.randn(1, 4, 6, 6, generator=g) for _ in range(2))
    now, then = torch.tensor([0.8]), torch.tensor([0.5])
    denoised = flow.denoised(x, now, velocity)
    after = x + (x - denoised) / now * (then - now)  # what ComfyUI's Euler does
    scale = lambda sigma: 1 - flow.time(sigma) if flow.scaled else torch.ones(())
    torch.testing.assert_close(after * scale(then), x * scale(now) + velocity * (flow.time(then) - flow.time(now)))


def test_a_class_that_derives_from_a_flows_is_not_taken_for_one(host, sampling):
    """WAN FlowRVS: a forecast velocity went where the picture belongs."""
    of = host.part("nodes.parametrisation").of
    made = sampling("CONST", calculate_denoised=lambda self, sigma, output, x: output)
    why = of(Patcher(made))
    assert why == "SD15 is no flow-matching model: its output is read as Own, and tqai forecasts the velocities of flows alone"
    assert of(Patcher(sampling("CONST", other=1))).scaled is False, "one that reads the output as its base does is a flow"


def test_what_is_no_flow_is_named(host, sampling):
    of = host.part("nodes.parametrisation").of
    assert "SD15 is no flow-matching model: its output is read as EPS" in of(Patcher(sampling("EPS")))
    assert "its sigmas go up to 14.6" in of(Patcher(sampling("CONST", 14.6)))


@pytest.mark.parametrize("name", ["flux", "sd3", "wan22_5b"])
def test_a_model_with_a_foreign_parametrisation_is_left_exact(host, name):
    m = host.load(name).clone()
    theirs = type(m.get_model_object("model_sampling"))
    own = type("Own", (theirs,), {"calculate_denoised": lambda self, sigma, output, x: 0.5 * output})
    m.object_patches["model_sampling"] = own(m.model.model_config) if host.real else own()
    plain = host.sample(m, name)
    assert torch.equal(host.sample(host.compress(m, host.pipeline()), name), plain)
    report = host.report()
    assert report["calls_skipped"] == 0
    assert "its output is read as Own" in report["fallbacks"][0]["why"]


@pytest.mark.parametrize("name", ["flux", "sd3", "wan22_5b"])
def test_scaled_latents_are_forecast_as_the_flow_they_are(host, name):
    """The same model behind COSMOS_RFLOW, whose sigma is t / (1 - t): closer than plain reuse, and the steps are the flow's times."""
    import comfy.model_sampling

    m = host.load(name).clone()
    made = type("Scaled", (comfy.model_sampling.COSMOS_RFLOW, type(m.get_model_object("model_sampling"))), {"sigma_max": 80.0})
    if host.real:
        made = type("Scaled", (comfy.model_sampling.ModelSamplingCosmosRFlow, comfy.model_sampling.COSMOS_RFLOW), {})
    m.object_patches["model_sampling"] = made(m.model.model_config) if host.real else made()
    times = torch.linspace(0.95, 0, 21)
    sample = lambda model: host.sample(model, name, sigmas=times / (1 - times))
    plain, errors = sample(m), {}
    for strategy in ("delta2", "delta"):
        chosen = host.run("TQAIStrategy", strategy={"strategy": strategy}, pipeline=host.pipeline()).result[0]
        x = sample(host.compress(m, chosen))
        errors[strategy] = float((x - plain).norm() / plain.norm())
    report = host.report()
    assert sum(d["action"] == "forecast" for d in report["decisions"]) >= 7
    assert [d["sigma"] for d in report["decisions"]] == pytest.approx(times[:-1].tolist(), abs=1e-5)
    assert errors["delta2"] < errors["delta"]
    assert torch.equal(sample(host.compress(m, host.pipeline("lyapunov", tau=1e-9))), plain)
