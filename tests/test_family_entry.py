"""``tqai tune --family``: an entry for a class that no file tunes, from the measured run to the preset that reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent))
from pipelines import bria, latte
from pipelines.base import SIZE, prompts

import tqai_core as tqai
from tqai_core import minis
from tqai_core.calibrate import family
from tqai_core.cli import main
from tqai_core.config import PRESETS, TAUS
from tqai_core.errors import TqaiError
from tqai_core.families import entry, find
from tqai_core.hosts.calibration_targets import Diffusion
from tqai_core.metrics import psnr

OLD = Path(__file__).parent / "old" / "family.json"  # of the Z-Image mini
FEW = {"SEEDS": (100,), "CHOICE": (102,), "PROOF": (104,)}


def target(of=bria, steps=24, **options):
    pipe = of.pipe()
    pipe.set_progress_bar_config(disable=True)
    return Diffusion(pipe, lambda seed: {**prompts(), "guidance_scale": 3.0, **SIZE, **options}, steps)


@pytest.fixture
def few(monkeypatch):
    for name, seeds in FEW.items():
        monkeypatch.setattr(family, name, seeds)


def test_an_unknown_class_gets_an_entry_that_a_preset_reads(few, tmp_path):
    unknown = target()
    assert find(unknown.model, "diffusers") is None
    found = family.measure(unknown, "mine")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(found))
    read = entry.read(path)
    assert (read.name, read.title) == ("mine", "BriaPipeline")
    assert read.diffusers.classes == ("diffusers.models.transformers.transformer_bria:BriaTransformer2DModel",)
    assert read.diffusers.levels == ("model",)
    taus = [read.tolerances[name] for name in PRESETS]
    assert taus == sorted(taus)
    known = {name: min(TAUS[name].values()) for name in PRESETS}
    for name in PRESETS:
        tried = found["proof"][name]
        loses = all(tried["default"][what] <= tried["found"][what] for what in ("error", "calls"))
        assert read.tolerances[name] >= (known[name] if loses else tried["tau"]), "what loses to the default is not written"
        assert tqai.preset(name, path) == tqai.preset(name, str(path)) == tqai.Config(monitor={"name": "lyapunov", "tau": taus.pop(0)})
    exact, _, _ = unknown.run(200)
    out, _, report = unknown.run(200, tqai.preset("balanced", path))
    assert report.calls_skipped >= 0.3 * report.calls
    assert psnr(out, exact) > 40


def test_the_entry_of_the_z_image_mini_serves_a_seed_that_it_never_saw():
    z_image = Diffusion(minis.pipeline("z_image"), lambda seed: minis.inputs("z_image", [seed % 10]))
    exact, _, _ = z_image.run(207)
    errors, calls = [], []
    for name in ("quality", "balanced"):
        out, _, report = z_image.run(207, tqai.preset(name, OLD))
        errors.append(psnr(out, exact))
        calls.append(report.calls - report.calls_skipped)
    assert min(errors) > 45
    assert errors[0] >= errors[1]
    assert calls[1] <= calls[0] <= 0.65 * report.calls


def test_where_nothing_is_forecast_nothing_is_written():
    no_flow = target(latte, video_length=4, clean_caption=False, mask_feature=False, negative_prompt=None)
    with pytest.raises(TqaiError, match=r"nothing is forecast \(.*sigma.*leave --family out"):
        family.measure(no_flow, "x")
    with pytest.raises(TqaiError, match=r"steps=8: .* 24 steps"):
        family.measure(target(steps=8), "x")


def test_the_command_writes_the_entry_and_its_balanced_preset(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(family, "LADDER", (0.075,))
    path, out = tmp_path / "deep" / "my.json", tmp_path / "balanced.json"
    assert main(["tune", "--demo", "flux", "--batch", "1", "--family", str(path), "-o", str(out)]) == 0
    assert "tau written" in capsys.readouterr().out
    assert tqai.Config.from_json(out.read_text()) == tqai.preset("balanced", path)
    assert json.loads(path.read_text())["classes"] == ["diffusers.models.transformers.transformer_flux:FluxTransformer2DModel"]


def test_a_search_over_a_class_that_no_file_knows_stays_at_level_model(tmp_path):
    pytest.importorskip("optuna")
    from tqai_core.calibrate import tune

    unknown, budget = target(steps=16), tune.Budget("calls", 0.9)
    found = tune.tune(unknown, budget, tmp_path / "s.db", trials=2)
    assert found["layers"] == []
    assert len(tune.load_study(tmp_path / "s.db")["trials"]) == 2
    assert found["proof"][found["kept"]]["error"] < 1e-3
    with pytest.raises(TqaiError, match="level 'block' does not know the transformer class BriaTransformer2DModel"):
        tune.tune(unknown, budget, tmp_path / "b.db", trials=1, levels=("block",))
    assert not (tmp_path / "b.db").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("tolerances"), ["tolerances", "tqai tune --family"]),
        (lambda d: d["tolerances"].pop("fast"), ["tolerances.fast"]),
        (lambda d: d["tolerances"].update(fast=0), ["tolerances.fast", "greater than 0"]),
        (lambda d: d["tolerances"].update(fast="0.1"), ["tolerances.fast"]),
        (lambda d: d.update(version=2), ["version", "should be 1"]),
        (lambda d: d.update(format="tqai-sampler"), ["format"]),
        (lambda d: d.update(levels=["block"]), ["levels.0"]),
        (lambda d: d.update(run="import os"), ["run"]),
        (lambda d: d.update(classes=[]), ["classes"]),
    ],
)
def test_a_wrong_entry_is_refused_with_the_field(tmp_path, change, words):
    data = json.loads(OLD.read_text())
    change(data)
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(TqaiError) as error:
        tqai.preset("fast", tmp_path / "x.json")
    for word in ["x.json", *words]:
        assert word in str(error.value)


def test_a_name_that_is_no_file_says_what_is_known(tmp_path):
    with pytest.raises(TqaiError, match=r"unknown family 'mine'; known: .*z_image, a file NAME.json of tqai tune --family"):
        tqai.preset("fast", "mine")
    with pytest.raises(TqaiError, match=r"none.json.*write it with tqai tune"):
        tqai.preset("fast", tmp_path / "none.json")
    (tmp_path / "p.json").write_text("print(1)")
    with pytest.raises(TqaiError, match="no JSON"):
        tqai.preset("fast", tmp_path / "p.json")
