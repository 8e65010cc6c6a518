from __future__ import annotations

import json

import pytest
from bench import default, dit

import tqai_core as tqai
from tqai_core.cli import main
from tqai_core.config import TAUS
from tqai_core.errors import TqaiError
from tqai_core.plot import chart
from tqai_core.report import dumps


def test_methods_lists_everything_registered(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for role, names in tqai.methods().items():
        assert role in text
        for name in names:
            assert name in text
    assert main(["methods", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {role: sorted(v) for role, v in data.items()} == tqai.methods()
    assert data["monitor"]["lyapunov"]["options"]["tau"]["help"]


def test_demo_draws_and_counts(tmp_path, capsys):
    assert main(["demo", "--kinds", "flux", "--out", str(tmp_path / "d"), f"--json={tmp_path / 'd.json'}"]) == 0
    assert "tqai balanced" in capsys.readouterr().out
    result = json.loads((tmp_path / "d.json").read_text())
    rows = {r["method"]: r for r in result["rows"]}
    assert rows["exact"]["calls"] == 48
    assert rows["tqai fast"]["calls"] < rows["tqai balanced"]["calls"] < 30
    assert rows["fewer steps"]["calls"] == rows["tqai balanced"]["calls"]
    assert rows["tqai balanced"]["psnr"] > rows["fewer steps"]["psnr"] + 3
    assert rows["tqai balanced"]["psnr_worst"] <= rows["tqai balanced"]["psnr_tail"]
    alone = {r["method"]: r for r in result["alone"]}
    assert set(alone) == {"tqai balanced", "tqai fast", "fewer steps"}
    assert alone["tqai balanced"]["runs"] == 10
    assert alone["tqai balanced"]["calls"] == alone["fewer steps"]["calls"]
    assert alone["tqai balanced"]["psnr_worst"] > alone["fewer steps"]["psnr"], "the worst is above the median of fewer steps"
    page = (tmp_path / "d" / "index.html").read_text()
    assert page.count("<img") == 4 + 3 + 2, "results, differences, the slider"
    assert page.count("<svg") == 2, "for a wide and for a narrow page"
    assert (tmp_path / "d" / "flux-exact.png").read_bytes()[:4] == b"\x89PNG"
    assert 'fill="#1f5fa8"' in chart(result["decisions"]["flux"])


def test_bad_input_is_one_line(capsys):
    assert main(["demo", "--kinds", "sdxl"]) == 2
    assert capsys.readouterr().err == "tqai: unknown mini sdxl; known: flux, sd3, wan\n"
    assert main(["nonsense"]) == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch, capsys):
    def broken(*args):
        raise ValueError("inside torch")

    monkeypatch.setattr("tqai_core.demo.run", broken)
    with pytest.raises(ValueError, match="inside torch"):
        main(["demo"])
    assert capsys.readouterr().err == ""

    def ours(*args):
        raise TqaiError("what, why, cure")

    monkeypatch.setattr("tqai_core.demo.run", ours)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "tqai: what, why, cure\n"


def test_bench_works_in_a_checkout_and_says_so_elsewhere(monkeypatch, capsys, tmp_path):
    from bench import codec

    monkeypatch.setattr(codec, "bench", lambda peers, tell: {"verdicts": [{"ok": False}]})
    monkeypatch.setattr(codec, "tables_of", lambda result: [("a table", ["what"], [["1"]])])
    assert main(["bench", "codec"]) == 1, "a promise fails"
    assert "a table" in capsys.readouterr().out
    monkeypatch.setattr("tqai_core.cli.__file__", str(tmp_path / "site-packages" / "tqai_core" / "cli.py"))
    assert main(["bench", "codec"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_a_class_that_nobody_tuned_is_close_to_its_exact_run(monkeypatch):
    monkeypatch.setattr(default, "SEEDS", 2)
    result = default.bench(["z_image"])
    data = json.loads(dumps(result))
    assert {(r["shift"], r["preset"]) for r in data["rows"]} == {(1.0, "untuned"), (3.0, "untuned")}
    for row in data["rows"]:
        assert row["skipped"] >= 0.45
        assert row["psnr"] >= row["least"] >= 45
    assert all(v["ok"] for v in data["verdicts"])
    worse = result | {"rows": [r | {"least": 44.0} for r in result["rows"]]}
    assert not all(v["ok"] for v in default.verdicts(worse)), "a promise can fail"


def test_what_a_family_gets_untuned_is_not_its_own_tolerance():
    for kind in default.KINDS:
        monitor = default.presets_of(kind)[default.UNTUNED].build()[2]
        assert monitor.tau == min(tau for family, tau in TAUS["balanced"].items() if family != kind)
    assert default.presets_of("flux")["flux"] == tqai.preset("balanced", "flux")
    assert set(default.presets_of("z_image")) == {default.UNTUNED}


@pytest.mark.parametrize("calls", range(5, 24))
def test_the_fixed_schedule_meets_the_calls_it_is_compared_at(calls):
    from tqai_core.monitors.fixed import Fixed
    from tqai_core.types import Step

    monitor, state = Fixed(interval=dit.interval_for(calls)), {}
    count = sum(monitor.decide(Step(i, 1 - i / 24, 24, i == 23), None, 0, state).compute for i in range(24))
    assert calls - 2 <= count <= calls
    if calls in (11, 12, 13):
        assert count == calls


def test_the_bench_runs_and_its_promises_are_computed_from_its_rows(monkeypatch):
    monkeypatch.setattr(dit, "TRUTH", 48)  # a coarse truth: this test is about the plumbing
    monkeypatch.setattr(dit, "SHIFTS", (1.0,))
    monkeypatch.setattr(dit, "SAMPLES", {"sd3": 2})
    monkeypatch.setattr(dit, "ALONE", {"sd3": 2})
    result = dit.bench(["sd3"], [0])
    data = json.loads(dumps(result))
    euler = {r["method"]: r for r in data["tables"]["sd3"]["euler"]}
    assert euler["exact"]["calls"] == 24
    assert euler["exact"]["nmse"] == 0
    assert euler["exact"]["psnr"] is None
    ours = euler["tqai balanced"]
    assert ours["calls"] == euler["plain reuse, same calls"]["calls"] == euler["fewer Euler steps, same calls"]["calls"]
    verdicts = {v["what"]: v for v in data["verdicts"]}
    assert verdicts["latent PSNR, dB"]["measured"] == ours["psnr"]
    assert verdicts["calls skipped, Euler 24, balanced"]["ok"] == (ours["skipped"] >= 0.48)
    worse = [r | {"nmse": r["nmse"] * 100} if r["method"] == "tqai balanced" else r for r in result["tables"]["sd3"]["euler"]]
    again = dit.verdicts("sd3", result["tables"]["sd3"] | {"euler": worse})
    assert not next(v for v in again if v["what"] == "NMSE / plain reuse at equal calls")["ok"], "a promise can fail"
    assert len(list(dit.tables_of(result))) == 5
    alone = {r["method"]: r for r in data["tables"]["sd3"]["alone"]}
    ours, fewer = alone["tqai balanced"], alone["fewer Euler steps, calls of balanced"]
    assert ours["calls"] == fewer["calls"]
    assert ours["psnr_worst"] <= ours["psnr_tail"] <= ours["psnr"]
    assert fewer["nmse_worst"] >= fewer["nmse_tail"] > ours["nmse_tail"], "errors have their tail at the other end"
    promise = "one at a time: minimum of balanced above the median of fewer steps at equal calls, dB"
    assert verdicts[promise]["measured"] == pytest.approx(ours["psnr_worst"] - fewer["psnr"])
    assert verdicts[promise]["ok"]
