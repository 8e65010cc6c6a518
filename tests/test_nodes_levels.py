"""Levels block and attention of the nodes, on the fake ComfyUI and on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tqai_core.metrics import nmse

NAMES = ("flux", "sd3", "sd35m", "wan22_5b", "wan_14b_i2v")
LEVELS = ("block", "attention")
ATTENTIONS = {"flux": 4, "sd3": 2, "sd35m": 5, "wan22_5b": 4, "wan_14b_i2v": 4}  # a forward of the real tiny models


def forecasts(report: dict[str, Any]) -> int:
    return sum(d["action"] == "forecast" for d in report["decisions"])


def strategy(host, name: str, **options: Any) -> Any:
    return host.run("TQAIStrategy", strategy={"strategy": name, **options}, pipeline=host.pipeline()).result[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_computing_everything_is_bit_exact(host, name, level):
    m = host.load(name)
    plain = host.sample(m, name)
    assert torch.equal(host.sample(host.compress(m, host.pipeline("lyapunov", tau=1e-9), level=level), name), plain)
    assert torch.equal(host.sample(m, name), plain)


@pytest.mark.shows("level {level}: every site skipped, same again")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_forecast_steps_skip_every_site(host, name, level):
    m = host.load(name)
    on = host.compress(m, host.pipeline(), level=level)
    plain = host.sample(m, name)
    x, report = host.sample(on, name), host.report()
    assert report["fallbacks"] == []
    assert forecasts(report) >= 7
    assert torch.isfinite(x).all()
    assert not torch.equal(x, plain)
    sites = report["per_site"]
    assert all(f"/{'attn' if level == 'attention' else 'block'}" in site or "/cross" in site for site in sites)
    assert {s["skipped"] for s in sites.values() if s["calls"]} == {forecasts(report)}
    assert {s["calls"] for s in sites.values() if s["calls"]} == {20}
    if host.real:
        ours = [s for s in sites if s.endswith("/cond/out")]
        assert len(ours) == (ATTENTIONS[name] if level == "attention" else {"sd35m": 3, "flux": 4}.get(name, 2))
    assert torch.equal(host.sample(on, name), x)
    assert host.report()["per_site"] == sites


@pytest.mark.parametrize("level", LEVELS)
def test_forecast_blocks_do_not_run(host, level):
    m = host.load("sd3")
    on = host.compress(m, host.pipeline(), level=level)
    with host.forwards(m) as ran:
        host.sample(on, "sd3")
    assert len(ran) == (20 - forecasts(host.report()) if level == "block" else 20)


@pytest.mark.parametrize("level", LEVELS)
def test_protected_blocks_stay_exact(host, level):
    m = host.load("sd3")
    pipeline = host.run("TQAISkipLayers", layers="0", pipeline=host.pipeline()).result[0]
    host.sample(host.compress(m, pipeline, level=level), "sd3")
    sites = host.report()["per_site"]
    assert not any(".0/" in site for site in sites)
    assert any(".1/" in site for site in sites)


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_split_that_changes_mid_run(host, level, monkeypatch):
    import sys

    m = host.load("sd3")
    on = host.compress(m, host.pipeline(), level=level)
    whole, report = host.sample(on, "sd3"), host.report()
    turns = []

    def memory(device=None, torch_free_too=False):
        turns.append(1)
        free = 10**12 if len(turns) % 2 else 1
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(sys.modules["comfy.model_management"], "get_free_memory", memory)
    split = host.sample(on, "sd3")
    assert host.report()["per_site"].keys() == report["per_site"].keys()
    assert forecasts(host.report()) == forecasts(report)
    assert (split - whole).abs().max() < 1e-2 * whole.abs().max()


def test_window_attention_and_its_residual(host):
    m = host.load("wan_14b_high")
    noise = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = host.sample(m, "wan_14b_high", noise=noise)
    pipeline = strategy(host, "window", density=0.5)
    x = host.sample(host.compress(m, pipeline, level="attention"), "wan_14b_high", noise=noise)
    report = host.report()
    assert torch.isfinite(x).all()
    assert not torch.equal(x, plain)
    assert any(site.endswith("/residual") and s["skipped"] for site, s in report["per_site"].items())
    assert all("cross" in f["where"] for f in report["fallbacks"])


@pytest.mark.parametrize("level", ["model", "attention"])
def test_the_entropy_that_stability_wants_is_measured(host, level):
    m = host.load("sd3")
    on = host.compress(m, host.pipeline("stability"), level=level)
    with host.runs([]) as runs:
        states = []

        def callback(step, x0, x, total):
            states.append(dict(runs[0].flow.gate_state.state))

        host.sample(on, "sd3", callback=callback)
    assert any("entropy" in state for state in states)
    seen = [v for state in states for v in state.get("entropy", [])]
    assert all(0 <= v <= 1.01 for v in seen)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan22_5b"])
def test_computed_steps_take_the_faster_dense_attention(host, name, monkeypatch):
    """As bf16 would; here forced. An override that was there before is the user's own attention and stays."""
    from tqai_core.attention import dense

    used = []
    inner = dense.products
    m = host.load(name)
    on = host.compress(m, host.pipeline("lyapunov", tau=1e-9), level="attention")
    plain = host.sample(on, name)
    monkeypatch.setattr(dense, "choice", lambda q, k, v: "products")
    monkeypatch.setattr(dense, "products", lambda *a: used.append(1) or inner(*a))
    fast = host.sample(on, name)
    assert used or host.real, "a real host may have chosen another attention"
    assert used or torch.equal(fast, plain)
    assert (fast - plain).abs().max() < 1e-3 * plain.abs().max()
    taken = m.clone()
    taken.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs)
    used.clear()
    assert torch.equal(host.sample(host.compress(taken, host.pipeline("lyapunov", tau=1e-9), level="attention"), name), plain)
    assert not used


@pytest.mark.shows("another node that replaces the attention")
def test_an_earlier_override_is_called_on_and_a_later_one_is_reported(host):
    calls = []

    def other(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    m = host.load("sd3").clone()
    plain = host.sample(m, "sd3")
    m.model_options["transformer_options"]["optimized_attention_override"] = other
    on = host.compress(m, host.pipeline(), level="attention")
    host.sample(on, "sd3")
    report = host.report()
    assert forecasts(report) >= 7
    assert len(calls) == 2 * (20 - forecasts(report))
    taken = host.compress(host.load("sd3"), host.pipeline(), level="attention").clone()
    taken.model_options["transformer_options"]["optimized_attention_override"] = other
    assert torch.equal(host.sample(taken, "sd3"), plain)
    assert "another node replaced the attention" in host.report()["fallbacks"][0]["why"]


def test_a_block_that_another_node_took_is_passed_through(host):
    m = host.load("sd3")
    on = host.compress(m, host.pipeline(), level="attention")
    taken = on.clone()
    taken.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    x = host.sample(taken, "sd3")
    report = host.report()
    assert torch.isfinite(x).all()
    assert "outside the blocks" in report["fallbacks"][0]["why"]
    assert not any(".0/" in site for site in report["per_site"])
    # one that was there before us is called inside our marker
    seen = []
    before = host.load("sd3").clone()
    before.set_model_patch_replace(lambda args, extra: seen.append(1) or extra["original_block"](args), "dit", "double_block", 0)
    host.sample(host.compress(before, host.pipeline(), level="attention"), "sd3")
    assert host.report()["fallbacks"] == []
    assert len(seen) == 20


def test_levels_need_a_model_whose_blocks_are_known(host):
    if host.real:
        pytest.skip("the tiny checkpoints hold no UNet")
    m = host.load("sdxl")
    with pytest.raises(ValueError, match="take level 'model'"):
        host.compress(m, host.pipeline(), level="block")
    assert torch.equal(host.sample(host.compress(m, host.pipeline()), "sdxl"), host.sample(m, "sdxl"))
    assert "no flow-matching model" in host.report()["fallbacks"][0]["why"]


def test_another_class_of_the_same_name_is_another_model(host):
    """AuraFlow's class is called MMDiT too, as SD3's."""
    if host.real:
        pytest.skip("the tiny checkpoints hold no AuraFlow")
    m = host.load("aura")
    assert type(m.model.diffusion_model).__name__ == "MMDiT"
    assert host.part("nodes.patch").kind_of(host.load("aura")).name == "auraflow"
    host.sample(host.compress(m, host.pipeline()), "aura")
    assert forecasts(host.report()) >= 7


def test_difference_guidance_says_that_it_does_nothing_here(host):
    on = host.compress(host.load("sd3"), strategy(host, "delta2", cfg="difference"))
    host.sample(on, "sd3")
    report = host.report()
    assert "cfg=difference" in report["fallbacks"][0]["why"]
    assert forecasts(report) >= 7


@pytest.mark.parametrize("level", ["model", *LEVELS])
def test_two_devices_at_once(host, level):
    """Multi-GPU hosts run cond and uncond in two threads on one state."""
    if host.real:
        pytest.skip("see test_nodes_real.py")
    m, out = host.load("sd3"), {}
    for codec in ("exact", "from pipeline"):
        on = host.compress(m, host.pipeline(), level=level, codec={"codec": codec})
        one, report = host.sample(on, "sd3"), host.report()
        on.model_options["multigpu"] = True
        out[codec] = one, host.sample(on, "sd3")
        assert {k: (v["calls"], v["skipped"]) for k, v in host.report()["per_site"].items()} == {
            k: (v["calls"], v["skipped"]) for k, v in report["per_site"].items()
        }
    (exact, exact_two), (one, two) = out["exact"], out["from pipeline"]
    assert nmse(exact_two, exact) < 1e-12
    assert nmse(two, one) < 2 * nmse(one, exact), "a rounding flips codes: two draws of the codec's error"
