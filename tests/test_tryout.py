"""``tqai try``: on a mini, on folders of a pipeline and of a language model; the verdict is that of the figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import tqai_core as tqai
from tqai_core.cli import main
from tqai_core.closeness import Closeness
from tqai_core.hosts.diffusers import tryout
from tqai_core.hosts.transformers import tryout as lm_tryout
from tqai_core.metrics import psnr


def attempt(capsys, *argv):
    status = main(["try", *map(str, argv), "--json"])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out), out.err


def test_a_mini_is_measured_and_what_is_pasted_gives_what_was_measured(capsys, tmp_path):
    result, told = attempt(capsys, "-m", "flux", "--prompt", "3", "--out", tmp_path, "--seed", 2)
    rows = {row["setting"]: row for row in result["rows"]}
    assert list(rows)[:4] == ["exact", "balanced", "fast", "quality"]
    assert rows["exact"]["computed"] == rows["exact"]["calls"] == 48
    assert rows["fast"]["computed"] <= rows["balanced"]["computed"] <= rows["quality"]["computed"] < 48
    pipe = tqai.minis.pipeline("flux")
    call = lambda: (
        pipe(**tqai.minis.inputs("flux", [3]), num_inference_steps=24, output_type="np", generator=torch.Generator().manual_seed(2)).images
    )
    exact = torch.from_numpy(call())
    with tqai.apply(pipe, tqai.preset("balanced", "flux")) as handle:
        ours = torch.from_numpy(call())
        assert rows["balanced"]["calls"] - rows["balanced"]["computed"] == handle.report().calls_skipped
    assert rows["balanced"]["psnr"] == pytest.approx(psnr(ours.movedim(-1, 1), exact.movedim(-1, 1)), abs=1e-3)
    assert result["verdict"] in told
    page = (tmp_path / "index.html").read_text()
    assert result["page"] == str(tmp_path / "index.html")
    for row in rows.values():
        assert len(row["files"]) == 1
        assert f'src="{row["files"][0].rpartition("/")[2]}"' in page
    for name, text in result["paste"]:  # nothing to paste where a loaded machine made it slower
        if name == "A script":
            names = {}
            exec(text, names)
            best = rows[result["best"]]
            skipped = names["handle"].report().calls_skipped
            assert abs(skipped - (best["calls"] - best["computed"])) <= 4, "of another seed"


def test_a_schedule_that_is_too_short_does_not_help_and_the_verdict_says_why(capsys, tmp_path, picture_folder):
    argv = ("-m", picture_folder, "--steps", 4, "--height", 64, "--width", 64, "--out", tmp_path)
    result, _ = attempt(capsys, *argv)
    assert not result["helps"]
    assert result["verdict"].startswith("It does not help here: no call was forecast, and the result is the exact one. nothing was skipped")
    assert [row["setting"] for row in result["rows"]] == ["exact", "balanced"], "one setting is enough to see that"
    assert result["rows"][1]["psnr"] is None, "equal: infinite"
    assert result["paste"] == []
    assert result["pipeline"] == "StableDiffusion3Pipeline"
    assert result["prompt"] == tryout.PROMPT


def row(name, seconds, computed, db, script="", same=False):
    outcome = SimpleNamespace(figures={"seconds": seconds, "peak": {"bytes": None}}, report=tqai.Report(48, 48 - computed))
    return tryout.Row(name, outcome, None if db is None else Closeness(db, 0.9, 0.0 if same else 0.1), (computed, 48), script)


def test_the_verdict_is_that_of_the_figures():
    exact = row("exact", 10.0, 48, None)
    balanced, fast, bad = row("balanced", 6.0, 24, 40.0), row("fast", 5.0, 20, 35.0), row("faster", 4.0, 16, 20.0)
    assert tryout.chosen([balanced, fast, bad], 30) is fast
    assert tryout.chosen([balanced, fast, bad], 38) is balanced
    assert tryout.chosen([bad], 30) is None
    assert tryout.chosen([row("idle", 9.0, 48, float("inf"), same=True)], 30) is None
    say = lambda rows, best, least=30: tryout._verdict(exact, rows, best, least)
    assert say([balanced, fast], fast).startswith("It helps: fast is 2.00 times as fast. It computes 20 of 48 model calls, 35.0 dB close")
    assert "within 30 dB" in say([bad], None)
    assert "closest, faster, is 20.0 dB" in say([bad], None)
    fewer = row(f"{tryout.FEWER} (10)", 5.0, 20, 36.0)
    assert "fewer steps with as many calls are closer (36.0 dB)" in say([fast, fewer], fast)
    assert say([fast, row(f"{tryout.FEWER} (10)", 5.0, 20, 25.0)], fast).endswith("Fewer steps with as many calls are 25.0 dB close.")
    assert "no time is saved" in say([row("fast", 9.9, 20, 35.0)], row("fast", 9.9, 20, 35.0))


def test_settings_are_finer_or_faster_in_words_of_scripts_and_graphs():
    for family in ("flux", None):
        for name, config, script, _ in tryout.settings(family):
            assert eval(script, {"tqai": tqai}) == config, name
    taus = {name.split()[0]: config.build()[2].tau for name, config, *_ in tryout.settings("wan")}
    assert taus["finer"] < taus["quality"] < taus["balanced"] < taus["fast"] < taus["faster"]


def test_a_language_model(capsys, tmp_path, lm_folder):
    """A random one: its words are far off soon, its caches are close; the figures are those of `tqai run --compare`."""
    prompt = "x" * 400
    result, _ = attempt(capsys, "-m", lm_folder, "--prompt", prompt, "--max-tokens", 16, "--out", tmp_path, "--kl", 1)
    assert [r["setting"] for r in result["rows"]] == [*lm_tryout.PRESETS]
    sizes = [r["cache"]["bytes_held"] for r in result["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert result["best"] == "k4v2"
    assert result["helps"]
    assert f"{result['rows'][2]['compare']['kl_mean']:.5f} nats" in result["verdict"]
    argv = [
        "run",
        prompt,
        "-m",
        str(lm_folder),
        "--bits-k",
        "4",
        "--bits-v",
        "2",
        "--recent",
        "12",
        "--max-tokens",
        "16",
        "--temperature",
        "0",
        "--compare",
    ]
    assert main([*argv, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["compare"]["kl_mean"] == pytest.approx(result["rows"][2]["compare"]["kl_mean"], rel=1e-4)
    assert again["cache"]["bytes_held"] == sizes[2]
    assert lm_tryout.chosen(result["rows"], 0) is None
    assert "no cache stays within a mean divergence of 0 nats" in lm_tryout.verdict_of(result["rows"], None, 0)
    assert (tmp_path / "index.html").read_text().count("<table") == 1


def test_a_short_text_does_not_help_and_time_that_is_up_ends_the_search(capsys, tmp_path, lm_folder):
    result, _ = attempt(capsys, "-m", lm_folder, "--prompt", "short", "--max-tokens", 4, "--out", tmp_path, "--minutes", 0)
    assert [r["setting"] for r in result["rows"]] == ["k8v4"]
    assert result["verdict"].startswith("It does not help here: nothing was packed.")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("-m", "flux", "--kl", "1"), "--kl asked, but this is a diffusers pipeline"),
        (("-m", "lm", "--steps", "4"), "--steps asked, but this is a language model"),
        (("-m", "flux", "--prompt", "a fox"), "a mini draws digits: give some"),
        (("-m", "flux", "--prompt", " "), "--prompt is empty"),
        (("-m", "flux", "--height", "64"), "--height asked, but flux is a mini of one size"),
        (("-m", "./nowhere"), "no such folder"),
        (("-m", "no-such-org/no-such-model"), "cannot load no-such-org/no-such-model"),
        (("-m", "flux", "--minutes", "nan"), "--minutes nan: give a number"),
        (("-m", "flux", "--psnr", "-1"), "--psnr -1: give a number"),
        (("-m", "flux", "--out", "/proc/x"), "cannot be written"),
        ((), "the following arguments are required: -m/--model; see tqai try --help"),
    ],
)
def test_a_mistake_is_one_line(capsys, argv, says):
    assert main(["try", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
