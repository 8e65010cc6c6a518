"""The photo mini, its judge, the students, and the bench of few steps."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from bench import few, judges  # noqa: E402
from bench.harness import Mini  # noqa: E402
from minis.judge import Judge, frechet, moments  # noqa: E402

import tqai_core as tqai  # noqa: E402
from tqai_core import TqaiError, minis, report  # noqa: E402
from tqai_core.config import preset  # noqa: E402
from tqai_core.hosts.diffusers import minis as host  # noqa: E402
from tqai_core.metrics import psnr  # noqa: E402
from tqai_core.minis import digits, names  # noqa: E402

LABORATORY = ROOT / "benchmarks" / "minis"
RESULT = ROOT / "benchmarks" / "results" / "few.json"
PHOTOS = (names.PHOTO, "photo_8", "photo_4")


def test_the_photo_mini_and_its_students_are_small_and_learnt():
    assert sum(names.weights(kind).stat().st_size for kind in PHOTOS) <= 6e6
    for kind in (names.PHOTO, *names.STUDENTS):
        log = json.loads((LABORATORY / f"{kind}.json").read_text())
        assert log["kind"] == kind
        assert log["loss"][-1][1] < log["loss"][0][1], "it learnt"


@pytest.mark.parametrize("side, count", [(16, 40), (32, 20)])
def test_what_was_asked_is_read_in_photographs_of_both_sizes(side, count):
    mini, prompts = Mini(names.PHOTO, side), torch.arange(count) % 20
    mini.schedule("euler", 1.0)
    pixels = mini.pixels(mini.run(prompts.tolist(), seed=3, steps=8).latents)
    assert pixels.shape == (count, 3, side, side)
    assert Judge.load().accuracy(pixels, prompts) >= 0.9


@pytest.mark.parametrize("kind, steps", [("photo_8", 8), ("photo_4", 4)])
def test_a_student_needs_few_steps_and_no_guidance(kind, steps):
    student, teacher = Mini(kind, 16), Mini(names.PHOTO, 16)
    prompts = list(range(20))
    made = {}
    for name, mini, count in (("student", student, steps), ("fine", teacher, 24), ("hasty", teacher, steps)):
        mini.schedule("euler", 1.0)
        guided = 1.0 if name == "hasty" else None  # as many calls as the student takes
        made[name] = mini.run(prompts, 5, count, guidance=guided)
    assert student.calls == steps
    pixels = student.pixels(made["student"].latents)
    assert Judge.load().accuracy(pixels, torch.tensor(prompts)) >= 0.9
    error = {name: float((made[name].latents - made["fine"].latents).square().mean()) for name in ("student", "hasty")}
    assert error["student"] < error["hasty"] / 2, "half the error of its teacher with the same calls"


def test_a_tenth_of_the_trajectories_of_every_prompt_is_held_back(monkeypatch):
    monkeypatch.syspath_prepend(str(LABORATORY))
    distil = importlib.import_module("distil")
    prompts = torch.arange(240) % 20
    (learnt, seen), (held, unseen) = (part[0] for part in distil.parted([(torch.arange(240.0), prompts)]))
    assert torch.cat([learnt, held]).sort().values.tolist() == list(range(240))
    assert len(held) == 24
    assert set(unseen.tolist()) == set(range(20))
    assert torch.equal(prompts[held.long()], unseen)
    assert torch.equal(prompts[learnt.long()], seen)


def test_the_students_know_trajectories_that_they_never_saw():
    for kind in ("photo_8", "photo_4"):
        log = json.loads((LABORATORY / f"{kind}.json").read_text())
        seen, unseen = (sum(log[name][-1][1:]) for name in ("seen", "unseen"))
        assert unseen < 1.3 * seen


def test_a_student_is_its_teacher_and_a_low_rank_difference():
    base, student = (host.transformer(kind).state_dict() for kind in ("photo", "photo_8"))
    name = "single_transformer_blocks.1.proj_mlp.weight"
    ranks = torch.linalg.svdvals(student[name] - base[name])
    assert int((ranks > 1e-4 * ranks[0]).sum()) == 32
    assert torch.equal(student["proj_out.bias"], base["proj_out.bias"])


def test_a_clip_student_draws_digits():
    mini, labels = Mini("wan_4"), [0, 3, 7]
    mini.schedule("uniform", 1.0)
    run = mini.run(labels, 1, 4)
    assert mini.calls == 4
    assert digits.accuracy(mini.pixels(run.latents), torch.tensor(labels)) >= 0.6


@pytest.mark.parametrize("kind, steps, computed, least", [("photo_8", 8, 5, 33), ("photo_4", 4, 3, 25)])
def test_the_preset_is_the_row_that_paid(kind, steps, computed, least):
    mini, prompts, few_steps = Mini(kind, 16), list(range(10)), preset("few")
    mini.schedule("euler", 1.0)
    exact, run = mini.run(prompts, 2, steps), mini.run(prompts, 2, steps, few_steps)
    row = mini.run(prompts, 2, steps, few.at_level("model", "order 1", steps, few.to_the_end(steps)).config)
    assert torch.equal(run.latents, row.latents)
    assert (exact.calls, run.calls) == (steps, computed)
    assert psnr(run.latents, exact.latents) > least
    with tqai.apply(mini.pipe, few_steps) as handle:
        mini.pipe(**host.inputs(kind, [1]), num_inference_steps=steps, output_type="latent")
        assert handle.nbytes == 0, "nothing is held after a run whose last step is forecast"
        assert handle.report().decisions[-1]["why"] == "one in 2"
    left = mini.run(prompts, 2, 3, few_steps)
    assert torch.equal(left.latents, mini.run(prompts, 2, 3).latents)
    assert left.report.calls_skipped == 0


@pytest.mark.parametrize("kind, shift, skipped", [("photo", 3, (3, 5)), ("flux", 3, (3, 5)), ("sd3", 3, (3, 5, 7)), ("sd3", 1, (3, 5, 7))])
def test_a_last_step_that_is_longer_than_the_others_is_computed(kind, shift, skipped):
    """As Flux' pipeline ends at a shift above 1; SD3's ends with a short step at any."""
    mini, prompts = Mini(kind, 16), [1, 4, 6, 8]
    mini.schedule("euler", shift)
    exact, run, fewer = (mini.run(prompts, 7, *how) for how in ((8,), (8, preset("few")), (8 - len(skipped),)))
    assert tuple(i for i, d in enumerate(run.report.decisions) if d["action"] == "forecast") == skipped
    assert run.calls == fewer.calls < exact.calls
    assert psnr(run.latents, exact.latents) > psnr(fewer.latents, exact.latents) + 2, "2 dB nearer than as many calls without tqai"


@pytest.mark.parametrize("kind, steps", [("photo_8", 8), ("photo_8", 6), ("photo_4", 4), ("wan", 8), ("wan_sizes", 8)])
def test_the_preset_pays_by_the_table(kind, steps):
    rows = [r for r in json.loads(RESULT.read_text())["rows"] if (r["mini"], r["steps"]) == (kind, steps)]
    name = few.at_level("model", "order 1", steps, few.to_the_end(steps)).name
    (row,) = (r for r in few.close(rows, "both") if (r["group"], r["method"]) == ("model level", name))
    assert row["cpu"] >= few.FASTER.get(steps, 1.25)


def test_labels_that_the_minis_do_not_have():
    with pytest.raises(TqaiError, match="from 0 to 19"):
        host.inputs(names.PHOTO, [21])
    with pytest.raises(TqaiError, match=r"unknown mini 'sdxl'.*photo_8"):
        minis.pipeline("sdxl")


def test_the_distance_of_features():
    a = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert frechet(moments(a), moments(a)) == pytest.approx(0, abs=1e-3)
    assert frechet(moments(a), moments(a + 2)) == pytest.approx(8 * 4, rel=1e-3)
    assert frechet(moments(a), moments(3 * a)) == pytest.approx(8 * 4, rel=0.1)


def test_the_clips_judge_prefers_clips():
    real, noise = digits.clips(60, seed=4)[0], torch.randn(60, 1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    judge = judges.Clips()
    assert judge.distance(real) < judge.distance(real + 0.3 * noise) / 2 < judge.distance(noise) / 4


def test_steps_that_are_skipped():
    assert few.skips(4) == [(2,)]
    assert few.skips(8) == [(6,), (4, 6), (2, 4, 6)]
    assert few.schedule(4, (2,)) == "schedule:steps=0+1+3,total=4"
    assert [few.to_the_end(steps) for steps in (4, 6, 8)] == [(3,), (3, 5), (3, 5, 7)]
    assert few.schedule(4, (3,)) == "schedule:steps=0+1+2,total=4,final=false"


def row(group: str, cpu: float, distance: float, psnr: float, **more: object) -> dict[str, object]:
    return {
        "mini": "m",
        "steps": 8,
        "seeds": 1,
        "group": group,
        "method": "",
        "failed": "",
        "cpu": cpu,
        "distance": distance,
        "psnr": psnr,
        **more,
    }


def test_fewer_steps_at_equal_time_are_a_line():
    line = [row(few.EXACT, 1.0, 1.0, math.inf), row(few.FEWER, 2.0, 3.0, 20.0)]
    parts = [row("model level", 4 / 3, 1.5, 30.0), row("x", 3.0, 2.9, 9.0), row("y", 0.9, 0.9, 40.0)]
    near, far, slow = few.against_fewer([*line, *parts])[2:]
    assert near["distance_fewer"] == pytest.approx(2.0)
    assert near["psnr_fewer"] == pytest.approx(20 + 20 * math.log10(2))
    assert few.better(near) == "both"
    assert far["distance_fewer"] == 3.0, "what the fastest one has in its longer time"
    assert few.better(far) == "Fréchet"
    assert slow["distance_fewer"] is None
    assert few.better(slow) == "no"


def test_promises_and_order():
    parts = {"good": (1.6, 1.04, 30.0), "bad": (1.6, 2.9, 15.0), "real": (1.7, 1.05, 9.0), "far from real": (1.9, 1.2, 30.0)}
    line = [row(few.EXACT, 1.0, 1.0, math.inf), row(few.FEWER, 2.0, 3.0, 20.0)]
    broken = {"mini": "m", "steps": 8, "group": "broken", "method": "", "failed": "why"}
    rows = few.against_fewer([*line, *(row(name, *figures) for name, figures in parts.items()), broken])
    look, both = few.verdicts({"rows": rows, "teachers": []})
    assert (look["measured"], look["ok"], both["measured"], both["ok"]) == (1.7, True, 1.6, True)
    assert [r["group"] for r in few.lost_first(rows)] == ["broken", "bad", "real", "good", "far from real", few.EXACT, few.FEWER]


def test_rows_measured_again_take_the_place_of_those_of_a_file(monkeypatch, tmp_path):
    file = tmp_path / "few.json"
    short = [
        few.Method("fewer steps", "2 steps", steps=2),
        few.at_level("model", "order 1", 4, (2,)),
        few.at_level("model", "reuse", 4, (2,)),
    ]
    monkeypatch.setattr(few, "methods", lambda kind, steps: short)
    monkeypatch.setattr(few, "FINE", 4)
    file.write_text(report.dumps(few.bench(["photo_4"], count=1)))
    first = json.loads(file.read_text())
    renamed = [replace(short[0], steps=3), *short[1:]]
    monkeypatch.setattr(few, "methods", lambda kind, steps: renamed if (kind, steps) == ("photo_4", 4) else [])
    again = json.loads(report.dumps(few.bench(only="photo_4 4 fewer", into=str(file), count=1)))
    assert [r["method"] for r in again["rows"]] == [r["method"] for r in first["rows"]]
    same = [r["psnr"] == before["psnr"] for r, before in zip(again["rows"], first["rows"], strict=True)]
    assert same == [True, False, True, True], "the exact run is measured again, and equal"
    assert again["rows"][2]["psnr_fewer"] > first["rows"][2]["psnr_fewer"], "three steps are nearer than two"
    assert again["teachers"] == first["teachers"]


def test_rows_to_replace_are_of_a_result(tmp_path):
    with pytest.raises(TqaiError, match="give --json=FILE of one"):
        few.bench(only="photo_8", into=None)
    (tmp_path / "x.json").write_text('{"bench": "dit"}')
    with pytest.raises(TqaiError, match="no result of bench few"):
        few.bench(only="photo_8", into=str(tmp_path / "x.json"))
    with pytest.raises(TqaiError, match="no row"):
        few.bench(only="photo_9")


def test_the_bench_end_to_end(monkeypatch):
    every = few.methods("photo_4", 4)
    assert {"fewer steps", "model level", "block level", "attention level", "sparse attention"} <= {m.group for m in every}
    monkeypatch.setattr(few, "methods", lambda kind, steps: [every[0], *(m for m in every if m.group == "model level")])
    monkeypatch.setattr(few, "FINE", 4)
    result = few.bench(["photo_4"], count=3)
    assert not any(r["failed"] for r in result["rows"])
    exact, fewer, reuse, line, reuse_to_the_end, to_the_end = result["rows"]
    assert exact["psnr_worst"] == math.inf
    assert {r["calls"] for r in (fewer, reuse, line, reuse_to_the_end, to_the_end)} == {0.75}
    assert to_the_end["psnr"] > reuse_to_the_end["psnr"]
    assert reuse["psnr"] > 15
    assert exact["read"] >= 0.9
    titles = [title for title, *_ in few.tables_of(result)]
    assert any("3 seeds" in title for title in titles)
    assert "promises" in titles
