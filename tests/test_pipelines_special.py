"""What some pipelines of the test bed do alone: outputs that change their shape, guidance that stops, blocks without a context."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent))
import pipelines
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, SkipLayerGuidance

import tqai_core as tqai
from tqai_core.metrics import nmse

STEPS = 24
FORCED = tqai.Config(strategy="delta2", monitor="fixed:interval=2,min_steps=4")


def runs(name, target=lambda pipe: pipe, prepare=lambda pipe: None, **inputs):
    """The exact outputs, those with every second step forecast, and the report."""
    family = pipelines.family(name)
    pipe = family.pipe()
    prepare(pipe)
    exact = family.call(pipe, STEPS, 0, **inputs)
    with tqai.apply(target(pipe), FORCED) as handle:
        outputs = family.call(pipe, STEPS, 0, **inputs)
        report = handle.report()
        assert handle.nbytes == 0
    return exact, outputs, report


def close(exact, outputs, limit):
    return all(0 < nmse(ours, true) < limit for ours, true in zip(outputs, exact, strict=True))


def guide(guider):
    return lambda pipe: pipe.update_components(guider=guider)


@pytest.mark.slow
def test_frames_that_are_dropped_half_way_begin_a_new_history():
    thinking = dict(num_frames=29, enable_temporal_reasoning=True, num_temporal_reasoning_steps=STEPS // 2)
    exact, outputs, report = runs("chronoedit", **thinking)
    assert exact[0].shape[2] == 2, "the frames between are gone"
    assert close(exact, outputs, 1e-3)
    assert any("another form" in fallback["why"] for fallback in report.fallbacks)
    assert 0.25 * report.calls <= report.calls_skipped < 0.5 * report.calls
    after = [decision["action"] for decision in report.decisions if decision["step"] >= STEPS // 2]
    assert after[0] == "compute"
    assert "forecast" in after


def test_a_branch_that_stops_half_way():
    exact, outputs, report = runs("wan_modular", prepare=guide(ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5)))
    first, second = (report.per_site[f"transformer/model/call{i}/out"] for i in (0, 1))
    assert (first["calls"], second["calls"]) == (STEPS, STEPS // 2)
    assert first["skipped"] > second["skipped"] > 0
    assert close(exact, outputs, 1e-3)


@pytest.mark.slow
def test_a_third_pass_that_begins_late_and_stops_early():
    """A guider that skips a layer does so by a hook on the block, in a part of the schedule."""
    skip = LayerSkipConfig(indices=[1], fqn="blocks")
    exact, outputs, report = runs("wan_modular", prepare=guide(SkipLayerGuidance(skip_layer_config=skip, skip_layer_guidance_stop=0.5)))
    calls = [report.per_site[f"transformer/model/call{i}/out"] for i in range(3)]
    assert [site["calls"] for site in calls] == [STEPS, STEPS, STEPS // 2 - 1]
    assert report.calls_skipped > 0.25 * report.calls
    assert close(exact, outputs, 1e-3)


@pytest.mark.parametrize("name", ["wan_modular", "minimax_h3"])
def test_the_pipeline_that_calls_a_bare_transformer_is_found(name):
    exact, outputs, report = runs(name, lambda pipe: pipe.transformer)
    _, same, whole = runs(name)
    assert all(map(torch.equal, outputs, same))
    assert not any(map(torch.equal, outputs, exact))
    assert report.calls_skipped == whole.calls_skipped > 0.3 * report.calls


@pytest.mark.slow
def test_two_guiders_share_their_calls_by_name():
    _, _, report = runs("ltx2_modular")
    branches = {site.split("/")[2] for site in report.per_site}
    assert branches == {"pred_cond", "pred_uncond", "pred_cond_stg", "pred_cond_modality"}
    assert {site.split("/")[3] for site in report.per_site} == {"out", "out1"}, "video and audio"


@pytest.mark.slow
def test_chunks_of_one_length_are_alike_in_the_report():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact, outputs, report = runs("sana_wm_refiner")
    assert report.evaluations == STEPS, "the last chunk's; calls that fill the cache are none of it"
    assert close(exact, outputs, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mochi", "minimax_music3"])
def test_a_schedule_that_rises_is_read_as_noise_that_falls(name):
    exact, outputs, report = runs(name)
    sigmas = [decision["sigma"] for decision in report.decisions]
    assert sigmas[0] == 1
    assert sigmas == sorted(sigmas, reverse=True)
    assert close(exact, outputs, 1e-3)
