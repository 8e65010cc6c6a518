"""The nodes on a ComfyUI: the fake one everywhere, real checkouts where COMFYUI_PATH names them."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

NAMES = ("flux", "sd3", "sd35m", "wan22_5b", "wan_14b_high", "wan_14b_i2v")
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "uni_pc", "dpmpp_2s_ancestral")


def forecasts(report: dict[str, Any]) -> int:
    return sum(d["action"] == "forecast" for d in report["decisions"])


@pytest.fixture
def model(host):
    return lambda name: host.load(name)


@pytest.mark.shows("disabled: the plain model, bit for bit")
@pytest.mark.parametrize("name", NAMES)
def test_disabled_is_the_model_itself(host, model, name):
    m = model(name)
    plain = host.sample(m, name)
    off = host.compress(m, enabled=False)
    assert off is m
    assert torch.equal(host.sample(off, name), plain)


@pytest.mark.shows("enabled: calls as promised, finite, same again")
@pytest.mark.parametrize("name", NAMES)
def test_enabled_computes_what_the_monitor_promised(host, model, name, record_property):
    m = model(name)
    on = host.compress(m, host.pipeline())
    with host.forwards(m) as ran:
        x = host.sample(on, name)
    report = host.report()
    assert report["fallbacks"] == []
    assert forecasts(report) >= 7
    record_property("figure", f"{name} {forecasts(report)} of 20")
    assert len(ran) == 20 - forecasts(report)
    assert sum(ran) == report["calls"] - report["calls_skipped"]
    assert torch.isfinite(x).all()
    assert 0 < report["bytes_held_peak"] < report["bytes_exact"]
    assert [d["action"] for d in report["decisions"][:3]] == ["compute"] * 3
    assert report["decisions"][-1]["action"] == "compute"
    assert torch.equal(host.sample(on, name), x), "a second run with the same seed differs"
    again = host.report()
    assert again["decisions"] == report["decisions"]
    assert again["per_site"] == report["per_site"]


@pytest.mark.shows("nothing skipped: the plain result, bit for bit")
@pytest.mark.parametrize("tau", [0.0, 1e-9])
@pytest.mark.parametrize("name", NAMES)
def test_computing_everything_is_bit_exact(host, model, name, tau):
    m = model(name)
    plain = host.sample(m, name)
    on = host.compress(m, host.pipeline("lyapunov", tau=tau))
    with host.forwards(m) as ran:
        assert torch.equal(host.sample(on, name), plain)
    assert len(ran) == 20
    assert (host.report()["bytes_held_peak"] > 0) is (tau > 0), "where nothing may be forecast nothing is held"
    assert "nothing was skipped" in host.report()["warnings"][0]
    assert torch.equal(host.sample(m, name), plain), "the model that was cloned changed"


class Stopped(Exception):
    pass


@pytest.mark.shows("nothing held after the end, an interrupt, an exception")
@pytest.mark.parametrize("ending", ["end", "exception", "interrupt"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_held_after_a_run(host, model, name, ending):
    m = model(name)
    on = host.compress(m, host.pipeline())
    options = json.dumps(sorted(map(str, on.model_options["transformer_options"])))
    clean = host.sample(on, name)
    peak, seen = [], []

    def callback(step, x0, x, total):
        peak.append(seen[0].held)
        if step == 9 and ending == "interrupt":
            host.interrupt()
        if step == 9 and ending == "exception":
            raise Stopped

    with host.runs(seen):
        if ending == "end":
            host.sample(on, name, callback=callback)
        else:
            with pytest.raises((Stopped, host.interrupted)):
                host.sample(on, name, callback=callback)
        assert max(peak) > 0
        assert seen[0].held == 0
        gone = weakref.ref(seen[0].flow)
        seen.clear()
    gc.collect()
    assert gone() is None, "the run is still referenced"
    assert options == json.dumps(sorted(map(str, on.model_options["transformer_options"])))
    assert not any("warn" in w for w in host.report()["warnings"])
    assert torch.equal(host.sample(on, name), clean), "the run after it is not clean"


@pytest.mark.shows("{sampler}, cfg 1 and 4")
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["flux", "sd3", "wan22_5b"])
def test_samplers(host, model, name, sampler, cfg):
    m = model(name)
    on = host.compress(m, host.pipeline())
    with host.forwards(m) as ran:
        x = host.sample(on, name, sampler=sampler, cfg=cfg)
    report = host.report()
    assert torch.isfinite(x).all()
    assert report["fallbacks"] == []
    assert forecasts(report) >= 7
    assert len(ran) == report["evaluations"] - forecasts(report)
    assert set(ran) == {1 if cfg == 1.0 else 2}
    assert torch.equal(host.sample(on, name, sampler=sampler, cfg=cfg), x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_that_evaluate_a_sigma_once_are_corrected_after_forecasts(host, model, sampler):
    """Samplers with two evaluations a step, or with noise of their own, are not. What is judged stays the model's own output."""
    finals, reports = [], []
    for correct in (True, False):
        strategy = host.run("TQAIStrategy", strategy={"strategy": "delta2", "correct": correct}, pipeline=host.pipeline()).result[0]
        finals.append(host.sample(host.compress(model("flux"), strategy), "flux", sampler=sampler))
        reports.append(host.report())
    assert torch.equal(*finals) == (sampler not in ("euler", "dpmpp_2m", "uni_pc"))
    assert forecasts(reports[0]) == forecasts(reports[1]) >= 7
    assert reports[0]["decisions"][3]["error"] == reports[1]["decisions"][3]["error"]


@pytest.mark.shows("batch split changes mid-run")
def test_a_batch_split_that_changes_mid_run_changes_nothing(host, model, monkeypatch):
    m = model("sd3")
    on = host.compress(m, host.pipeline(), codec={"codec": "exact"})  # a coded number may round the other way in another batch
    whole, report = host.sample(on, "sd3"), host.report()
    turns = []

    def memory(device=None, torch_free_too=False):
        turns.append(1)
        free = 10**12 if len(turns) % 2 else 1
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(sys.modules["comfy.model_management"], "get_free_memory", memory)
    with host.forwards(m) as ran:
        split = host.sample(on, "sd3")
    assert {1, 2} <= set(ran)
    assert [d["action"] for d in host.report()["decisions"]] == [d["action"] for d in report["decisions"]]
    assert host.report()["per_site"].keys() == report["per_site"].keys()
    assert (split - whole).abs().max() < 1e-4 * whole.abs().max()


def test_prompts_of_unequal_length_run_apart(host, model):
    m = model("sd3")
    on = host.compress(m, host.pipeline())
    with host.forwards(m) as ran:
        host.sample(on, "sd3", negative=host.conds("sd3", 2, tokens=13 if not host.real else 11))
    report = host.report()
    assert set(ran) == {1}
    assert forecasts(report) >= 7
    assert len(ran) == 2 * (20 - forecasts(report))


def test_a_prompt_that_starts_late_gets_a_history_first(host, model):
    """SD3's own example zeroes its negative prompt from 10 % on."""
    m = model("sd3")
    on = host.compress(m, host.pipeline())
    negative = [*host.conds("sd3", 2, start_percent=0.0, end_percent=0.4), *host.conds("sd3", 3, start_percent=0.4, end_percent=1.0)]
    host.sample(on, "sd3", negative=negative)
    report = host.report()
    assert set(report["per_site"]) == {f"sd3/model/{branch}/out" for branch in ("cond", "uncond", "uncond.2")}
    assert forecasts(report) >= 5
    assert any("history" in d["why"] for d in report["decisions"])
    sites = report["per_site"]
    assert sites["sd3/model/uncond.2/out"]["skipped"] > 0


def test_a_control_that_ends_in_the_middle_is_not_forecast_on(host, model, monkeypatch):
    """What a ControlNet adds is an input of the model: where it is gone, the step is computed and the history begins anew."""
    from comfy.patcher_extension import WrappersMP

    from tqai_core.metrics import nmse

    def gives(executor, x, t, c_concat, c_crossattn, control, *args, **kw):
        control = {"output": [], "a kind of its own": [torch.ones(1)]} if float(t.flatten()[0]) > 0.47 else None  # gone at the twelfth step
        return executor(x, t, c_concat, c_crossattn, control, *args, **kw)

    def takes(executor, x, t, c_concat, c_crossattn, control, *args, **kw):
        return executor(x, t, c_concat, c_crossattn, control, *args, **kw) + (0 if control is None else 0.5 * x)

    def controlled(compress):
        m = model("sd3").clone()
        m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "gives", gives)
        m = compress(m).clone()
        m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "takes", takes)
        return host.sample(m, "sd3")

    exact = controlled(lambda m: m)
    ours, report = controlled(lambda m: host.compress(m, host.pipeline())), host.report()
    assert [f["why"].split(":")[0] for f in report["fallbacks"]] == ["input 'control' is gone"]
    assert [d["action"] for d in report["decisions"]][9:14] == ["forecast", "compute", "compute", "compute", "forecast"]
    assert forecasts(report) >= 6
    monkeypatch.setattr(host.part("nodes.run").Inputs, "change", lambda self, branch, inputs: None)
    unseen = controlled(lambda m: host.compress(m, host.pipeline()))
    assert nmse(ours, exact) < nmse(unseen, exact), "a forecast with what the control had added"
    if not host.real:  # random weights of a real model are rough: its forecasts err by themselves
        assert nmse(ours, exact) < min(5e-5, 0.1 * nmse(unseen, exact))


def test_a_condition_run_again_at_a_step_has_a_history_of_its_own(host, model):
    """Skip-layer guidance: a second forward of the positive prompt with a block left out."""
    import comfy.samplers

    m = model("sd3")

    def again(args):
        options = args["model_options"].copy()
        options["transformer_options"] = {
            **options["transformer_options"], "patches_replace": {"dit": {("double_block", 0): lambda a, extra: a}}
        }  # fmt: skip
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - weak)

    def sites(guided):
        guided.set_model_sampler_post_cfg_function(again, disable_cfg1_optimization=True)
        host.sample(host.compress(guided, host.pipeline()), "sd3")
        return host.report()["per_site"]

    both = sites(m.clone())
    host.sample(host.compress(m, host.pipeline()), "sd3")
    alone = host.report()["per_site"]
    assert set(both) - set(alone) == {"sd3/model/cond#2/out"}
    assert both["sd3/model/cond#2/out"]["skipped"] == both["sd3/model/cond/out"]["skipped"] > 0


def test_img2img_and_a_slice_of_a_schedule(host, model):
    m = model("sd3")
    on = host.compress(m, host.pipeline())
    sigmas = torch.linspace(1, 0, 41)[20:]
    x = host.sample(on, "sd3", sigmas=sigmas, latent=torch.randn(1, 16, 16, 16))
    report = host.report()
    assert torch.isfinite(x).all()
    assert report["evaluations"] == 20
    assert forecasts(report) >= 7


@pytest.mark.shows("WAN 2.2 A14B: the second sampler goes on with the first one's history")
@pytest.mark.parametrize("changed", ["nothing", "the latent", "the sigma", "the tolerance"])
def test_a_second_expert_inherits_the_history_of_the_latent_it_goes_on_with(host, model, changed):
    """It lives as long as the latent that the first sampler made, is used for that latent alone, and only where it fits."""
    pipeline = host.pipeline("lyapunov", tau=10.0)
    one, two = (host.compress(model(f"wan_14b_{part}"), pipeline, level="model") for part in ("high", "low"))
    legacies, sigmas = host.part("nodes.patch").LEGACIES, torch.linspace(1, 0, 41)
    x = host.sample(one, "wan_14b_high", sigmas=sigmas[:21], raw=True)
    assert legacies.nbytes > 0
    whole = host.report()["bytes_held_peak"]
    assert legacies.nbytes <= whole
    if changed == "the tolerance":
        two = host.compress(model("wan_14b_low"), host.pipeline("lyapunov", tau=1e-6), level="model")
    again = x.clone() if changed != "the latent" else x + 1e-3
    rest = sigmas[20:] if changed != "the sigma" else sigmas[22:]
    go = lambda m: host.sample(m, "wan_14b_low", sigmas=rest, latent=again, noise=torch.zeros_like(again))
    y, report = go(two), host.report()
    first = report["decisions"][0]
    assert first["action"] == "compute"
    if changed == "nothing":
        assert first["why"] == "the other expert's history fits"
        assert first["error"] > 0
        assert [d["action"] for d in report["decisions"][1:4]] == ["forecast"] * 3, "no second warm-up"
        assert torch.equal(go(two), y), "the history is not used up: the same latent gives the same picture"
    else:
        assert first["why"] == ("the other expert's history does not fit" if changed == "the tolerance" else "warm-up")
        assert [d["action"] for d in report["decisions"][:3]] == ["compute"] * 3
    if changed == "the tolerance":
        assert torch.equal(y, go(model("wan_14b_low")))
    del x
    gc.collect()
    assert legacies.nbytes == 0, "the history outlived its latent"


@pytest.mark.shows("WAN 2.2 A14B: two models, two samplers")
def test_two_experts_share_a_pipeline_and_no_state(host, model):
    pipeline = host.pipeline(warmup=2)
    high, low = model("wan_14b_high"), model("wan_14b_low")
    one = host.compress(high, pipeline, unique_id="3")
    two = host.compress(low, pipeline, unique_id="13")
    sigmas = torch.tensor([8 * u / (1 + 7 * u) for u in torch.linspace(1, 0, 21).tolist()])  # WAN's shift
    with host.runs([]) as runs:
        x = host.sample(one, "wan_14b_high", sigmas=sigmas[:11])
        first = host.report()
        assert runs[0].held == 0, "the first expert's memory is still held while the second one runs"
        x = host.sample(two, "wan_14b_low", sigmas=sigmas[10:], latent=x, noise=torch.zeros_like(x))
        second = host.report()
    assert torch.isfinite(x).all()
    again = host.sample(one, "wan_14b_high", sigmas=sigmas[:11])
    again = host.sample(two, "wan_14b_low", sigmas=sigmas[10:], latent=again, noise=torch.zeros_like(x))
    assert torch.equal(again, x), "a second run with the same seed differs"
    for report in (first, second):
        assert report["evaluations"] == 10
        assert [d["action"] for d in report["decisions"][:2]] == ["compute"] * 2
        assert forecasts(report) >= 2, "10 of 20 steps are not a short schedule"


def test_short_schedules_are_left_alone(host, model):
    on = host.compress(model("flux"), host.pipeline())
    host.sample(on, "flux", steps=4, cfg=1.0)
    report = host.report()
    assert forecasts(report) == 0
    assert "too few" in report["decisions"][-1]["why"]


@pytest.mark.shows("two Compress nodes: a clear error")
def test_two_compress_nodes_in_a_row(host, model):
    once = host.compress(model("sd3"))
    with pytest.raises(ValueError, match="already went through TQAI Compress: remove one"):
        host.compress(once)


def test_a_clone_of_the_patched_model_samples_the_same(host, model):
    on = host.compress(model("sd3"), host.pipeline())
    assert torch.equal(host.sample(on.clone(), "sd3"), host.sample(on, "sd3"))


def test_another_step_skipper_switches_us_off(host, model):
    m = model("sd3")
    on = host.compress(m, host.pipeline()).clone()
    on.model_options["transformer_options"]["easycache"] = object()
    assert torch.equal(host.sample(on, "sd3"), host.sample(m, "sd3"))
    assert "EasyCache" in host.report()["fallbacks"][0]["why"]


def test_a_rising_schedule_is_computed(host, model):
    m = model("sd3")
    on = host.compress(m, host.pipeline())
    sigmas = torch.linspace(0.1, 0.9, 20)
    assert torch.equal(host.sample(on, "sd3", sigmas=sigmas), host.sample(m, "sd3", sigmas=sigmas))
    assert "do not fall" in host.report()["fallbacks"][0]["why"]


def test_skip_layers(host, model):
    m = model("sd3")
    layers = host.run("TQAISkipLayers", layers="0, 1", pipeline=host.pipeline()).result[0]
    plain = host.sample(m, "sd3")
    assert torch.equal(host.sample(host.compress(m, layers), "sd3"), plain)
    assert "all 2 blocks" in host.report()["fallbacks"][0]["why"]
    wrong = host.run("TQAISkipLayers", layers="1-3").result[0]
    with pytest.raises(ValueError, match="skip layer 2 asked, but this sd3 model has 2 blocks"):
        host.compress(m, wrong)


@pytest.mark.shows("memory budget: host memory first, then exact")
def test_budget_falls_back_to_exact(host, model):
    m = model("sd3")
    on = host.compress(m, host.pipeline(), memory_budget=0)
    assert torch.equal(host.sample(on, "sd3"), host.sample(m, "sd3"))
    assert "over the memory budget" in host.report()["decisions"][-1]["why"]


@pytest.mark.shows("memory budget: host memory first, then exact")
def test_budget_goes_to_host_memory_first(host, model, monkeypatch):
    """There is one kind of memory here, so the run is told that its tensors lie on a GPU."""
    gpu = property(lambda run: torch.device("cuda"), lambda run, device: None)
    monkeypatch.setattr(host.part("nodes.run").Run, "_device", gpu, raising=False)
    m = model("sd3")
    free, report = host.sample(host.compress(m, host.pipeline()), "sd3"), host.report()
    tight = host.compress(m, host.pipeline(), memory_budget=0)
    with host.runs([]) as runs:
        homes = []
        x = host.sample(tight, "sd3", callback=lambda *a: homes.append(runs[0].flow.memory.offload_device))
    assert homes[5] == torch.device("cpu")
    assert "kept in CPU memory" in host.report()["fallbacks"][0]["why"]
    assert forecasts(host.report()) == forecasts(report)
    assert torch.equal(x, free)
    monkeypatch.setattr(host.part("nodes.run").Run, "room", property(lambda run: lambda: 0, lambda run, room: None), raising=False)
    host.sample(tight, "sd3")
    assert forecasts(host.report()) == 0
    assert "computed exactly from here on" in host.report()["fallbacks"][0]["why"]


def test_room_is_reserved_when_the_model_is_loaded(host, model, monkeypatch):
    m = model("sd3")
    asked = []
    if host.real:
        import comfy.model_management as management

        real = management.load_models_gpu

        def load(models, memory_required=0, *args, **kw):
            asked.append(memory_required)
            return real(models, memory_required, *args, **kw)

        monkeypatch.setattr(management, "load_models_gpu", load)
    else:
        import comfy_fake

        monkeypatch.setattr(comfy_fake, "LOADED", asked)
    host.sample(m, "sd3")
    host.sample(host.compress(m, host.pipeline()), "sd3")
    plain, ours = asked
    assert ours - plain >= host.report()["bytes_held_peak"]
    host.sample(host.compress(m, host.pipeline(), memory_budget=0), "sd3")
    assert asked[-1] == plain


def test_live_events_once_a_step(host, model, monkeypatch):
    if host.real:
        import types

        sent = []
        server = types.ModuleType("server")
        instance = types.SimpleNamespace(send_sync=lambda event, data, sid=None: sent.append((event, data)))
        server.PromptServer = types.SimpleNamespace(instance=instance)
        monkeypatch.setitem(sys.modules, "server", server)
    else:
        sent = host.sent
        sent.clear()
    host.sample(host.compress(model("sd3"), host.pipeline(), unique_id="42"), "sd3")
    assert {event for event, _ in sent} == {"tqai.step"}
    assert len(sent) == 21  # and once at the end
    last = sent[-1][1]
    assert last["node"] == "42"
    assert last["state"] == "active"
    assert (last["step"], last["total"]) == (20, 20)
    assert last["skipped"] == forecasts(host.report())
    assert last["error"] > 0
    assert last["estimate"] is None, "fixed estimates nothing"
    assert last["bytes"] == 0
    assert max(data["bytes"] for _, data in sent) > 0
    json.dumps(sent)


def test_report_finds_the_samplings_before_it(host, model):
    prompt = {
        "7": {"class_type": "TQAICompress", "inputs": {"model": ["1", 0]}},
        "8": {"class_type": "KSampler", "inputs": {"model": ["7", 0]}},
        "9": {"class_type": "TQAIReport", "inputs": {"samples": ["8", 0]}},
        "10": {"class_type": "TQAIReport", "inputs": {"samples": ["5", 0]}},
    }
    patch = host.part("nodes.patch")
    real, patch.executing = patch.executing, lambda: "8"
    try:
        host.sample(host.compress(model("sd3"), host.pipeline(), unique_id="7"), "sd3")
    finally:
        patch.executing = real
    host.sample(host.compress(model("sd3"), host.pipeline(), unique_id="70"), "sd3")
    latent = {"samples": torch.zeros(1, 16, 4, 4)}
    out = host.run("TQAIReport", unique_id="9", prompt=prompt, samples=latent)
    samples, text, chart, data, difference = out.result
    assert samples is latent
    assert difference.shape == (1, 64, 64, 3), "nothing to compare with: black"
    assert difference.max() == 0
    assert len(out.ui["images"]) == 1
    assert out.ui["closeness"] == []
    assert "sampler 8" in text
    assert text in out.ui["text"]
    assert chart.shape == (1, 300, 800, 3)
    assert 0 <= chart.min() < chart.max() <= 1
    (entry,) = json.loads(data)
    assert (entry["node"], entry["sampler"], entry["done"]) == ("7", "8", True)
    assert entry["evaluations"] == 20
    assert "bytes_held" in entry["decisions"][0]
    other = host.run("TQAIReport", unique_id="10", prompt=prompt, samples=latent)
    assert "has run before this node" in other.result[1]
    assert json.loads(other.result[3]) == []
    # another workflow in the same session, where 7 and 8 are other nodes
    foreign = {
        "7": {"class_type": "CLIPTextEncode", "inputs": {}},
        "8": {"class_type": "KSampler", "inputs": {"model": ["1", 0]}},
        "9": {"class_type": "VAEDecode", "inputs": {"a": ["7", 0], "b": ["8", 0]}},
        "10": {"class_type": "TQAIReport", "inputs": {"samples": ["9", 0]}},
    }
    other = host.run("TQAIReport", unique_id="10", prompt=foreign, samples=latent)
    assert json.loads(other.result[3]) == []


def test_the_report_compares_with_the_exact_run(host, model):
    from tqai_core.metrics import psnr, ssim

    prompt = {
        "7": {"class_type": "TQAICompress", "inputs": {"model": ["1", 0]}},
        "8": {"class_type": "KSampler", "inputs": {"model": ["7", 0]}},
        "6": {"class_type": "TQAICompress", "inputs": {"model": ["1", 0]}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["6", 0]}},
        "9": {"class_type": "TQAIReport", "inputs": {"samples": ["8", 0], "exact": ["5", 0]}},
    }
    patch, finals = host.part("nodes.patch"), {}
    real = patch.executing
    try:
        for node, sampler in (("6", "5"), ("7", "8")):
            patch.executing = lambda sampler=sampler: sampler
            finals[node] = host.sample(host.compress(model("sd3"), host.pipeline(), unique_id=node), "sd3")
    finally:
        patch.executing = real
    ours, theirs = finals["7"], host.sample(model("sd3"), "sd3")
    assert torch.equal(ours, finals["6"])
    assert not torch.equal(ours, theirs)
    given = {"samples": {"samples": ours}, "exact": {"samples": theirs}}
    report = lambda **more: host.run("TQAIReport", unique_id="9", prompt=prompt, **{**given, **more})

    out = report()
    assert out.result[0] is given["samples"]
    (entry,) = json.loads(out.result[3])
    assert entry["node"] == "7", "what made the exact run is not reported"
    found, close = entry["exact"]["latent"], psnr(ours, theirs)
    assert found == {
        "psnr": pytest.approx(close), "ssim": pytest.approx(ssim(ours, theirs)),
        "largest": pytest.approx(float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))),
    }  # fmt: skip
    assert close > 20
    assert f"| latent | {close:.1f} dB | {found['ssim']:.4f} | " in out.result[1]
    assert out.ui["closeness"] == [{"node": "7", "text": f"{close:.1f} dB to exact"}]
    assert len(out.ui["images"]) == 2
    assert out.result[4].shape == (1, *ours.shape[-2:], 3)
    assert out.result[4].max() == 1

    image = torch.rand(2, 24, 16, 3, generator=torch.Generator().manual_seed(0))
    wrong = image.clone()
    wrong[1, 5, 6] = 1 - wrong[1, 5, 6]
    out = report(image=wrong, exact_image=image)
    assert out.ui["closeness"][0]["text"] == f"{psnr(wrong, image):.1f} dB to exact", "the picture is what counts"
    assert (out.result[4] > 0).nonzero().tolist() == [[0, 5, 6, c] for c in range(3)]
    assert report(image=image, exact_image=image).ui["closeness"][0]["text"] == "identical to exact"
    assert "link both" in report(image=image).result[1]
    nest = lambda *parts: {"samples": torch.nested.nested_tensor(list(parts))}
    video, sound = theirs, torch.ones(1, 16, 4, 7)
    out = report(samples=nest(ours, sound), exact=nest(video, sound))
    told = json.loads(out.result[3])[0]["exact"]
    assert told["latent"]["psnr"] == pytest.approx(close)
    assert (told["latent 2"]["psnr"], told["latent 2"]["largest"]) == (None, 0), "JSON knows no inf"
    smaller = report(exact={"samples": theirs[..., 1:]})
    assert "latent not compared" in smaller.result[1]
    assert "exact" not in json.loads(smaller.result[3])[0]
    assert smaller.ui["closeness"] == []


def test_pipelines_are_saved_and_loaded(host):
    import tqai_core as tqai

    made = host.run("TQAIScorer", scorer={"scorer": "snr", "schedule": "cosine"}).result[0]
    made = host.run("TQAIStrategy", strategy={"strategy": "delta"}, pipeline=made).result[0]
    made = host.run("TQAIMonitor", monitor={"monitor": "lyapunov", "tau": 0.03}, pipeline=made).result[0]
    kept, text = host.run("TQAISavePipeline", pipeline=made, name="team/mine").result
    assert kept is made
    config = tqai.Config.from_json(text)
    assert (config.scorer, config.strategy, config.monitor) == ("snr:schedule=cosine", "delta", "lyapunov:tau=0.03")
    assert host.run("TQAILoadPipeline", file="team/mine.json [output]").result[0] == made
    cls = host.pack.NODE_CLASS_MAPPINGS["TQAILoadPipeline"]
    options = cls.INPUT_TYPES()["required"]["file"][1]["options"]
    assert "team/mine.json [output]" in options
    assert cls.validate_inputs(file=options[0]) is True


@pytest.mark.parametrize("name", ["../mine", "/etc/mine", "a/../../b", "", ".hidden", "a\\b"])
def test_files_stay_in_their_folder(host, name):
    with pytest.raises(ValueError, match=r"file name|outside"):
        host.run("TQAISavePipeline", pipeline=host.pipeline(), name=name)
    files = host.part("nodes.files")
    with pytest.raises(ValueError, match=r"outside|no pipeline file"):
        files.read(f"{name}.json [output]")


def test_a_link_out_of_the_folder_is_refused(host, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = Path(sys.modules["folder_paths"].get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "link.json"
    link.symlink_to(secret)
    try:
        with pytest.raises(ValueError, match="outside"):
            host.part("nodes.files").read("link.json [input]")
    finally:
        link.unlink()


def test_broken_files_say_what_is_wrong(host):
    folder = Path(sys.modules["folder_paths"].get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    cls = host.pack.NODE_CLASS_MAPPINGS["TQAILoadPipeline"]
    for text, word in (
        ("{", "JSON"),
        ("[]", "a config is a dict"),
        ("[" * 9999, "nested deeper"),
        ('{"monitor": "nope"}', "unknown monitor"),
        ('{"x": 1}', "unknown x"),
    ):
        (folder / "broken.json").write_text(text)
        assert word in cls.validate_inputs(file="broken.json [input]")
    assert "no pipeline file" in cls.validate_inputs(file="absent.json [output]")


def test_skip_layer_text_is_checked(host):
    cls = host.pack.NODE_CLASS_MAPPINGS["TQAISkipLayers"]
    assert cls.validate_inputs(layers=" 0, 5-8 ,-1") is True
    assert host.run("TQAISkipLayers", layers=" 0, 5-8 ,-1").result[0].skip_layers == (-1, 0, 5, 6, 7, 8)
    assert "give numbers, ranges or module names" in cls.validate_inputs(layers="5 8")


def test_schemas_did_not_change_by_accident(host):
    """Node ids, inputs and their order are in people's saved workflows. To change them on purpose, edit the snapshot.

    A new method adds a choice without that; none may go, and the first one is the default.
    """
    snapshot = Path(__file__).with_name("fakes") / "schemas.json"
    found = {}
    for node, cls in host.pack.NODE_CLASS_MAPPINGS.items():
        schema = cls.GET_SCHEMA()
        assert schema.node_id == node
        found[node] = {
            "display_name": schema.display_name,
            "category": schema.category,
            "inputs": [[i.id, i.v1()[0] if hasattr(i, "v1") else i.get_io_type(), bool(i.optional)] for i in schema.inputs],
            "options": {i.id: [o.key for o in i.options] for i in schema.inputs if hasattr(i, "options") and hasattr(i.options[0], "key")},
            "outputs": [o.display_name for o in schema.outputs],
        }
    known = json.loads(snapshot.read_text())
    for node, was in known.items():
        now = found[node].pop("options")
        for name, keys in was.pop("options").items():
            assert now[name][0] == keys[0]
            assert set(keys) <= set(now[name]), f"{node}: a choice of {name} is gone"
    assert found == known, json.dumps(found)


def test_a_workflow_saved_before_an_option_was_there_still_runs(host):
    """Every option of a method may be left out and is its default then; options of caches alone are not offered."""
    from tqai_core.registry import REGISTRY

    for node, role in (("TQAIScorer", "scorer"), ("TQAIStrategy", "strategy"), ("TQAIMonitor", "monitor"), ("TQAICompress", "codec")):
        inputs = host.pack.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
        combo = next(group[role] for group in inputs.values() if role in group)
        for option in combo[1]["options"]:
            if option["key"] not in REGISTRY[role]:
                continue
            known = REGISTRY[role][option["key"]].options()
            needed = set(option["inputs"].get("required", {}))
            offered = {name for name, about in known.items() if about["level"] != "kv"}
            assert needed == offered & {"file"}
            assert set(option["inputs"].get("optional", {})) | needed == offered
    stage = host.run("TQAIStrategy", strategy={"strategy": "delta2"}).result[0]
    assert stage.strategy == "delta2"


def test_every_input_is_explained(host):
    for cls in host.pack.NODE_CLASS_MAPPINGS.values():
        schema = cls.GET_SCHEMA()
        assert schema.description
        assert "tqai" in schema.search_aliases
        assert all(i.tooltip for i in schema.inputs if i.id != "pipeline" or i.optional), schema.node_id
        assert all(o.tooltip for o in schema.outputs)


def test_mappings_match(host):
    assert host.pack.NODE_CLASS_MAPPINGS.keys() == host.pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node, cls in host.pack.NODE_CLASS_MAPPINGS.items():
        assert cls.GET_SCHEMA().display_name == host.pack.NODE_DISPLAY_NAME_MAPPINGS[node]


def test_every_node_has_a_help_page_and_two_languages(host):
    root = Path(__file__).resolve().parents[1]
    assert host.pack.WEB_DIRECTORY == "./web"
    for node, cls in host.pack.NODE_CLASS_MAPPINGS.items():
        schema = cls.GET_SCHEMA()
        page = (root / "web/docs" / f"{node}.md").read_text()
        assert page.startswith(f"# {schema.display_name}\n")
        for language in ("en", "de"):
            texts = json.loads((root / "locales" / language / "nodeDefs.json").read_text())
            assert texts.keys() == host.pack.NODE_CLASS_MAPPINGS.keys()
            told = texts[node]
            assert list(told["inputs"]) == [i.id for i in schema.inputs]
            assert list(told["outputs"]) == [str(n) for n in range(len(schema.outputs))]
            assert all(i.tooltip is None or told["inputs"][i.id]["tooltip"] for i in schema.inputs)
            if language == "en":
                assert (told["display_name"], told["description"]) == (schema.display_name, schema.description)
                assert [told["inputs"][i.id].get("tooltip") for i in schema.inputs] == [i.tooltip for i in schema.inputs]


def test_the_scorer_offers_calibrations_of_the_models_folder(host, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(sys.modules["folder_paths"], "models_dir", str(tmp_path))
    cls = host.pack.NODE_CLASS_MAPPINGS["TQAIScorer"]

    def offered():
        options = cls.INPUT_TYPES()["required"]["scorer"][1]["options"]
        return next(o for o in options if o["key"] == "fisher")["inputs"]["required"]["file"][1]["options"]

    assert offered() == [""]
    for family, layers in (("flux", 2), ("wan", 30)):
        header = json.dumps({"format": 1, "complete": True, "family": family})
        tensors = {"fisher": torch.rand(layers, 2, 2, 3), "sigmas": torch.tensor([0.9, 0.5, 0.1])}
        (tmp_path / "tqai").mkdir(exist_ok=True)
        save_file(tensors, str(tmp_path / "tqai" / f"{family}.safetensors"), {"tqai-calibration": header})
    assert offered() == ["flux.safetensors", "wan.safetensors"]
    flux = host.load("flux")
    blocks = len(host.part("nodes.patch").kind_of(flux).blocks)
    save_file({**tensors, "fisher": torch.rand(blocks, 2, 2, 3)}, str(tmp_path / "tqai" / "mine.safetensors"), {
        "tqai-calibration": json.dumps({"format": 1, "complete": True, "family": "flux"})
    })  # fmt: skip
    made = host.run("TQAIScorer", scorer={"scorer": "fisher", "file": "mine.safetensors"}).result[0]
    assert made.scorer == f"fisher:file={tmp_path / 'tqai' / 'mine.safetensors'}"
    host.compress(flux, made)
    foreign = host.run("TQAIScorer", scorer={"scorer": "fisher", "file": "wan.safetensors"}).result[0]
    with pytest.raises(ValueError, match="wan model with 30 layers"):
        host.compress(flux, foreign)
    with pytest.raises(ValueError, match="no calibration 'gone"):
        host.run("TQAIScorer", scorer={"scorer": "fisher", "file": "gone.safetensors"})
    with pytest.raises(ValueError, match="outside"):
        host.run("TQAIScorer", scorer={"scorer": "fisher", "file": "../x.safetensors"})


def test_a_shared_pipeline_names_no_file_outside_of_comfyuis_folders(host, tmp_path):
    """A table or bases that a pipeline file, or an option of a node, names: those of models/tqai alone are opened."""
    from safetensors.torch import save_file

    outside = tmp_path / "outside.safetensors"
    save_file({"fisher": torch.rand(2, 2, 2, 3), "sigmas": torch.tensor([0.9, 0.5, 0.1])}, str(outside))
    files = host.part("nodes.files")
    for stage in ({"scorer": f"fisher:file={outside}"}, {"codec": f"turbo:basis={outside}"}, {"scorer": "fisher:file=../../x\0y"}):
        path = files.write("evil", json.dumps({"strategy": "delta2", "monitor": "lyapunov", **stage}))
        assert path.is_file()
        assert "plain name" in host.part("nodes.load_pipeline").TQAILoadPipeline.validate_inputs(file="evil.json [output]")
        with pytest.raises(ValueError, match=r"lies outside|no file name"):
            host.run("TQAILoadPipeline", file="evil.json [output]")
    with pytest.raises(ValueError, match="outside"):
        host.run("TQAIScorer", scorer={"scorer": "fisher", "file": str(outside)})
    with pytest.raises(ValueError, match="outside"):
        host.compress(host.load("flux"), None, codec={"codec": "turbo", "basis": str(outside)})


def test_a_shared_workflow_builds_no_endless_range_of_layers(host):
    node = host.part("nodes.skip_layers").TQAISkipLayers
    assert "numbers below 10,000" in node.validate_inputs(layers="0-999999999")
    with pytest.raises(ValueError, match="numbers below 10,000"):
        host.run("TQAISkipLayers", layers="0-999999999")
