"""Tuning: valid candidates, a study that survives a kill, the proof, the page; and the schedule it finds."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import tqai_core as tqai
from tqai_core.calibrate import page, tune
from tqai_core.calibrate.run import calibrate
from tqai_core.cli import main
from tqai_core.hosts import calibration_targets as targets
from tqai_core.types import Step

optuna = pytest.importorskip("optuna")


def small(steps=16):
    return targets.demo("flux", count=1, steps=steps)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "s.db"
    return path, tune.tune(small(), tune.Budget("calls", 0.6), path, trials=6)


def test_every_candidate_is_a_valid_pipeline():
    class Trial:
        """Answers at random, as a sampler does."""

        def __init__(self, seed):
            import random

            self.r = random.Random(seed)

        def suggest_categorical(self, name, choices):
            return self.r.choice(choices)

        def suggest_int(self, name, low, high):
            assert low <= high, name
            return self.r.randint(low, high)

        def suggest_float(self, name, low, high, log=False):
            return self.r.uniform(low, high)

    for seed in range(300):
        budget = tune.Budget("calls", (0.3, 0.5, 0.9)[seed % 3])
        config = tune.candidate(Trial(seed), (16, 24, 50)[seed % 3], budget, ("model", "block", "attention"), (0, 3))
        assert tqai.Config.from_json(config.to_json()) == config
        config.build()


def test_a_study_is_measured_and_proved(found):
    _, result = found
    assert len(result["trials"]) == 6
    assert {row["trial"] for row in result["trials"]} >= set(result["front"])
    front = [next(r for r in result["trials"] if r["trial"] == n) for n in result["front"]]
    assert all(a["calls"] < b["calls"] and a["error"] > b["error"] for a, b in itertools.pairwise(front))
    assert not set(tune.SEEDS) & {*tune.CHOICE, *tune.PROOF}
    proof = result["proof"]
    config = tqai.Config.from_dict(result["config"])
    if result["kept"] == "tuned":
        assert proof["tuned"]["error"] <= proof["default"]["error"] or not result["default_fits"]
        assert config != tqai.preset("balanced", "flux")
    else:
        assert config == tqai.preset("balanced", "flux")
    assert [layer for layer, _ in result["layers"]] != []


def test_what_loses_is_not_written(monkeypatch, tmp_path):
    """Where the default preset is within the budget too."""
    bad = tqai.Config(strategy="delta", monitor="fixed:interval=4,min_steps=1")
    lie = {"trial": 0, "config": bad.to_dict(), "error": 0.0, "calls": 0.5, "bytes": 1.0, "time": 0.5}
    monkeypatch.setattr(tune, "rows_of", lambda study: [lie])
    result = tune.tune(small(), tune.Budget("calls", 0.8), tmp_path / "s.db", trials=1)
    assert result["default_fits"]
    assert result["proof"]["tuned"]["error"] > result["proof"]["default"]["error"]
    assert result["kept"] == "default"
    assert tqai.Config.from_dict(result["config"]) == tqai.preset("balanced", "flux")


def test_a_killed_study_loses_no_finished_trial(tmp_path):
    path = tmp_path / "k.db"
    code = """
import os, pathlib, signal, sys
from tqai_core.hosts import calibration_targets as targets
from tqai_core.calibrate import tune
measure, calls = tune.Bench.measure, []
def counted(self, config, seeds):
    calls.append(config)
    if len(calls) == 4 + 4:  # four layers alone, three trials, and the fourth is under way
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, config, seeds)
tune.Bench.measure = counted
tune.tune(targets.demo("flux", count=1, steps=16), tune.Budget("calls", 0.6), pathlib.Path(sys.argv[1]), trials=50)
"""
    run = subprocess.run([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL, check=False)
    assert run.returncode == -signal.SIGKILL
    before = tune.load_study(path)["trials"]
    assert len(before) == 3
    after = tune.tune(small(), tune.Budget("calls", 0.6), path, trials=len(before) + 1)["trials"]
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    with pytest.raises(ValueError, match="other settings"):
        tune.tune(small(20), tune.Budget("calls", 0.6), path, trials=1)


@pytest.mark.parametrize("text", ["calls", "calls=x", "calls=1.5", "flops=0.5", "bytes=-1"])
def test_budgets_are_checked(text):
    with pytest.raises(ValueError, match="budget"):
        tune.Budget.parse(text)
    assert tune.Budget.parse("bytes=1000").limit == 1000


def test_spread_keeps_its_ends_and_its_count():
    assert tune.spread(3, 2, 1.0, 12, 24) == (0, 1, 2, 4, 7, 10, 12, 14, 17, 20, 22, 23)
    dense_first, dense_last = tune.spread(1, 1, 1.6, 8, 24), tune.spread(1, 1, 0.6, 8, 24)
    assert sum(dense_first) < sum(dense_last)


def test_the_schedule_computes_what_it_lists():
    monitor, state = tqai.registry.build("monitor", "schedule:steps=0+1+4,total=6"), {}
    made = [monitor.decide(Step(i, 1 - i / 6, 6, i == 5), None, 1, state).compute for i in range(6)]
    assert made == [True, True, False, False, True, True]
    assert "6 evaluations" in monitor.idle(Step(0, 1.0, 7))
    assert monitor.idle(Step(0, 1.0, 6)) is None
    with pytest.raises(ValueError, match="numbers from 0 to 5"):
        tqai.Config(monitor="schedule:steps=0+9,total=6")


def test_pages_stand_alone(found, tmp_path):
    path, result = found
    (tmp_path / "s.json").write_text(json.dumps(result))
    calibrate(small(4), tmp_path / "c.safetensors", seeds=(100,))
    for name, needed in (("s.json", "Proof"), (str(path), "Pareto"), ("c.safetensors", "Sensitivity")):
        text = page.page(tmp_path / name)
        assert needed in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
        assert pictures
        for picture in pictures:
            ElementTree.fromstring(picture)
    assert page.page(tmp_path / "c.safetensors").count("layer 3, head 0") == 2 * 2 * 3, "keys and values, sensitivity and bits, bands"
    assert page.pareto(result).count("<circle") == sum(r["error"] > 0 for r in result["trials"]) + 1, "one in the legend"
    (tmp_path / "x.json").write_text("{}")
    for wrong in (tmp_path / "none", tmp_path / "x.json"):
        with pytest.raises(ValueError):
            page.page(wrong)


def test_commands(tmp_path, capsys):
    out, study, plot = tmp_path / "t.json", tmp_path / "t.db", tmp_path / "t.svg"
    command = ["tune", "--demo", "flux", "--batch", "1", "--steps", "16", "--trials", "2", "--budget", "calls=0.6"]
    assert main([*command, "--study", str(study), "-o", str(out), "--plot", str(plot)]) == 0
    assert "Pareto front" in capsys.readouterr().out
    tqai.Config.from_json(out.read_text())
    ElementTree.fromstring(plot.read_text())
    assert main(["report", str(study), "-o", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    assert main(["tune", "--demo", "lm", "--study", str(tmp_path / "l.db")]) == 2
    assert "invalid choice: 'lm' (choose from" in capsys.readouterr().err
