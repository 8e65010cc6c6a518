from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")

from bench import dit, dit_peers
from bench import dit_caches as peers
from bench.dit_peers import Rival, Track, at_zero, duels, lost_first, measure, mixing, summary_lines, verdicts
from bench.spectrum import Fit, Schedule

from tqai_core.report import dumps
from tqai_core.types import nbytes

STEPS = 8


@pytest.fixture(scope="module")
def flux():
    track = Track("flux", steps=STEPS, samples=2)
    track.exact(7)
    return track


@pytest.fixture(scope="module")
def sd3():
    track = Track("sd3", steps=STEPS, samples=1)
    track.exact(7)
    return track


def rival(name, function, helped=False, zero=None, **options):
    def on(**options):
        def enable(mini):
            clear = peers.context(mini.pipe) if helped else lambda: None
            undo = function(mini.pipe, **options)
            return (lambda: (undo(), clear())), (lambda: peers.held(mini.pipe))

        return enable

    return Rival(name, "test", on(**options), steps=STEPS, zero=on(**zero) if zero else None)


def clean(track):
    model = track.mini.pipe.transformer
    for name, module in model.named_modules():
        assert not {"forward", "cache_context"} & set(vars(module)), name
        registry = vars(module).get("_diffusers_hook")  # pipelines give the model an empty one themselves
        assert registry is None or (name == "" and not registry.hooks), name
    assert getattr(model, "_cache_config", None) is None


@pytest.fixture(scope="module")
def ratios(flux):
    return peers.calibrated_ratios(flux.mini.pipe, lambda: flux.exact(100), STEPS)


@pytest.mark.parametrize("name", ["PAB", "FirstBlockCache", "MagCache", "TaylorSeer", "Spectrum"])
def test_a_peer_runs_saves_holds_and_leaves_no_trace(flux, ratios, name):
    one = {
        "PAB": rival("PAB", peers.pab, low=-1, high=1001),
        "FirstBlockCache": rival("FirstBlockCache", peers.first_block, threshold=0.5),
        "MagCache": rival("MagCache", peers.mag_cache, threshold=0.3, ratios=ratios, steps=STEPS),
        "TaylorSeer": rival("TaylorSeer", peers.taylor_seer, interval=2, lite=True, dtype=torch.float32),
        "Spectrum": rival("Spectrum", peers.spectrum, schedule=Schedule(warmup=3, window=2, flex=0, stop=1)),
    }[name]
    before = flux.exact(0)
    exact, row = measure(flux, [one], [0])
    assert row["failed"] is None
    assert row["note"] == ""
    assert min(row["calls"], row["attention"]) < STEPS - 0.5
    assert row["held"] > 0
    assert 0 < row["nmse"] < 0.5
    assert exact["nmse"] == 0
    assert exact["calls"] == exact["attention"] == STEPS
    clean(flux)
    assert peers.held(flux.mini.pipe) == 0
    assert torch.equal(flux.exact(0).latents, before.latents)


def test_spectrum_computes_a_warm_up_then_growing_gaps_then_the_end():
    assert Schedule(warmup=5, window=2, flex=0.75, stop=0.9).computed(24) == {0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 22, 23}
    assert Schedule(warmup=2, window=3, flex=0, stop=1).computed(12) == {0, 1, 4, 7, 10}
    assert Schedule(warmup=30).computed(24) == set(range(24))


def test_spectrum_fits_what_it_can_span_and_ridge_and_blend_do_as_said():
    times, now = torch.linspace(-1, 0.2, 8, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    cubic = lambda t: 4 * t**3 - 2 * t**2 + t - 3
    forecast = lambda fit: float(fit.weights(times, now) @ cubic(times))
    want, values = float(cubic(now)), cubic(times)
    slope = (values[-1] - values[-2]) / (times[-1] - times[-2])
    line = float(values[-1] + slope * (now - times[-1]))
    assert forecast(Fit(order=3, ridge=0)) == pytest.approx(want, abs=1e-9)
    assert forecast(Fit(order=3, ridge=0, blend=0)) == pytest.approx(line, abs=1e-9)
    assert forecast(Fit(order=3, ridge=0, blend=0.25)) == pytest.approx(0.25 * want + 0.75 * line, abs=1e-9)
    errors = [abs(forecast(Fit(order=3, ridge=ridge)) - want) for ridge in (1e-4, 1e-2, 1)]
    assert errors == sorted(errors)
    assert errors[-1] > 10 * errors[0]


def test_spectrum_is_closer_than_reuse_and_keeps_a_fit_for_each_branch(flux):
    schedule = Schedule(warmup=4, window=2, flex=0, stop=1)
    fitted = rival("Spectrum", peers.spectrum, blend=0.5, schedule=schedule)
    seen = []

    def reuse(mini):
        model = mini.pipe.transformer
        original, at = model.forward, {"step": -1, "call": 0, "held": {}}

        def forward(*args, **kwargs):
            step = mini.pipe.scheduler.step_index or 0
            at["call"] = at["call"] + 1 if step == at["step"] else 0
            at["step"] = step
            if step in schedule.computed(STEPS):
                at["held"][at["call"]] = original(*args, **kwargs)
            return at["held"][at["call"]]

        model.forward = forward
        return (lambda: vars(model).pop("forward")), (lambda: seen.append(len(at["held"])) or 0)

    _, spectrum, plain = measure(flux, [fitted, Rival("reuse", "test", reuse, steps=STEPS)], [0, 1])
    assert spectrum["calls"] == plain["calls"] == len(schedule.computed(STEPS))
    assert spectrum["nmse"] < 0.5 * plain["nmse"]
    assert set(seen) == {2}, "guidance is two calls"
    clean(flux)


def test_threshold_zero_is_judged_bit_by_bit(flux):
    first = rival("FirstBlockCache", peers.first_block, threshold=0.5, zero=dict(threshold=0.0))
    loose = rival("loose", peers.first_block, threshold=0.5, zero=dict(threshold=0.5))
    broken = Rival("broken", "test", None, steps=STEPS, zero=lambda mini: (_ for _ in ()).throw(RuntimeError("why")))
    none = rival("PAB", peers.pab, low=-1, high=1001)
    found = at_zero(flux, [first, loose, broken, none], 0)
    assert found == {("FirstBlockCache", ""): "yes", ("loose", ""): "NO", ("broken", ""): "fails: RuntimeError"}
    exact, row, other = measure(flux, [first, none], [0, 1])
    assert (exact["zero"], row["zero"], other["zero"]) == ("", "yes", "")
    assert row["psnr_worst"] <= row["psnr_mean"]
    assert row["psnr_sd"] > 0
    assert exact["psnr_sd"] is None
    assert row["share"] == row["calls"] / STEPS
    clean(flux)


def test_ratios_come_from_the_peers_own_calibration(ratios, flux):
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert all(0.3 < r < 3 for r in ratios)
    with pytest.raises(ValueError, match="number of steps"):
        peers.calibrated_ratios(flux.mini.pipe, lambda: flux.exact(100, 3), STEPS)
    clean(flux)


def test_a_failing_peer_is_a_row_with_its_reason_and_the_next_row_is_sound(sd3):
    first = sd3.exact(0)
    broken = Rival("broken", "test", lambda mini: (_ for _ in ()).throw(RuntimeError("first line\nsecond")), steps=STEPS)
    rows = measure(sd3, [rival("FirstBlockCache", peers.first_block), broken, Rival("Euler", "4 steps", steps=4)], [0, 1])
    by = {r["peer"]: r for r in rows}
    assert by["FirstBlockCache"]["failed"].startswith("ValueError: No cache context is set")
    assert by["broken"]["failed"] == "RuntimeError: first line"
    assert by["Euler"]["failed"] is None
    assert by["Euler"]["calls"] == 4
    clean(sd3)
    assert torch.equal(sd3.exact(0).latents, first.latents)


def test_saving_nothing_is_said_and_help_is_what_makes_it_save(flux):
    from tqai_core.hosts.diffusers.minis import pixels

    shape = lambda x: pixels("flux", x).unsqueeze(2)
    plain, helped = (
        rival("SeaCache", peers.sea_cache, threshold=1.0),
        rival("SeaCache", peers.sea_cache, True, threshold=1.0, latents=shape),
    )
    _, idle, running = measure(flux, [plain, helped], [0])
    assert idle["note"] == "saved nothing: 0 calls"
    assert idle["nmse"] == 0
    assert running["note"] == ""
    assert running["calls"] < STEPS - 1
    clean(flux)


def test_bytes_are_walked_through_what_the_hooks_hold(flux):
    pipe = flux.mini.pipe
    seen = []

    def enable(mini):
        undo = peers.pab(pipe, low=-1, high=1001)

        def look():
            hooks = [h for m in pipe.transformer.modules() if (r := vars(m).get("_diffusers_hook")) for h in r.hooks.values()]
            caches = [hook.state.cache for hook in hooks if hasattr(hook, "state")]
            seen.append((peers.held(pipe), nbytes(caches)))
            return seen[-1][0]

        return undo, look

    result = flux.run(Rival("PAB", "", enable, steps=STEPS), 0)
    assert len(seen) == STEPS
    assert all(walked == counted > 0 for walked, counted in seen)
    assert result.held == max(walked for walked, _ in seen)


def test_the_walk_survives_rings_and_counts_shared_storage_once(flux):
    class Thing:
        pass

    a, b, big = Thing(), Thing(), torch.zeros(100)
    a.other, b.other, a.x, b.x, a.model = b, a, big, big[:10], flux.mini.pipe.transformer
    assert nbytes(list(peers._tensors([a, b], set()))) == 400


def test_pab_mixes_the_guidance_branches(flux):
    row = mixing(flux, [0])
    assert row["shared_cond"] == STEPS, "cond is always computed"
    assert row["shared_uncond"] <= 1, "and uncond gets cond's attention"
    assert row["per_branch_cond"] == row["per_branch_uncond"] == STEPS / 2
    assert row["shared_attention"] == pytest.approx(row["per_branch_attention"], abs=0.6)
    assert row["ratio"] > 5
    clean(flux)


def test_cache_dit_runs_and_is_undone(flux):
    pytest.importorskip("cache_dit")
    before, call = flux.exact(0), type(flux.mini.pipe).__call__
    names = [name for name, _ in flux.mini.pipe.transformer.named_modules()]
    _, row = measure(flux, [rival("DBCache", peers.db_cache, threshold=0.6, warmup=2, separate=True, steps=STEPS)], [0])
    assert row["failed"] is None
    assert row["calls"] < STEPS - 0.5
    assert row["held"] > 0
    assert type(flux.mini.pipe).__call__ is call
    assert [name for name, _ in flux.mini.pipe.transformer.named_modules()] == names, "blocks in their old order"
    clean(flux)
    assert torch.equal(flux.exact(0).latents, before.latents)


def test_every_family_has_its_rows():
    for kind in ("flux", "sd3", "wan"):
        names = {r.peer for r in dit_peers.rivals(kind, [1.0] * 24)}
        assert names >= {
            "PAB",
            "FasterCache",
            "FirstBlockCache",
            "MagCache",
            "TaylorSeer",
            "SeaCache",
            "DBCache",
            "DBCache + TaylorSeer",
            "Spectrum",
        }
        assert names >= {"Euler", "UniPC", "DPM++"}
        mine = [r.setting for r in dit_peers.ours(kind)]
        assert mine[:3] == ["quality", "balanced", "fast"]


def test_what_is_missing_is_named_with_its_cure(monkeypatch):
    import importlib.util

    from diffusers import hooks

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = dit_peers.absent()
    assert "pip install" in missing["cache-dit"]
    monkeypatch.setattr(hooks, "TeaCacheConfig", object, raising=False)
    assert "TeaCache" not in dit_peers.absent()
    monkeypatch.delattr(hooks, "TeaCacheConfig")
    assert "TeaCache" in dit_peers.absent()


def row(peer, setting, cpu, error, **over):
    return {"peer": peer, "setting": setting, "cpu": cpu, "nmse": error, "ode": error, "failed": None, "note": "", **over}


def test_duels_compare_at_no_more_cpu_time_and_promises_can_fail():
    rows = [
        row("exact", "24", 1.0, 0.0), row("tqai", "balanced", 2.0, 1e-4), row("tqai", "fast", 2.5, 3e-4),
        row("tqai", "tau", 1.2, 0.0, note="saved nothing"),
        row("A", "slow", 1.5, 5e-4), row("A", "close", 1.5, 5e-5), row("A", "quick", 2.2, 5e-4), row("A", "late", 0.9, 1e-9),
        row("A", "dead", 3.0, 1e-9, failed="why"), row("A", "idle", 1.1, 0.0, note="saved nothing"),
    ]  # fmt: skip
    by = {d["setting"]: d for d in duels("flux", rows)}
    assert set(by) == {"slow", "close", "quick", "late"}, "failed and idle rows are no rivals"
    assert (by["slow"]["ok"], by["slow"]["tqai"], by["slow"]["default"]) == (True, "balanced", "better")
    assert (by["close"]["ok"], by["close"]["default"]) == (False, "faster, less close")
    assert (by["quick"]["ok"], by["quick"]["tqai"], by["quick"]["default"]) == (True, "fast", "closer, slower")
    assert by["late"]["tqai"] == "exact run"
    result = {"tables": {"flux": rows}}
    checks = verdicts(result)
    assert [v["ok"] for v in checks] == [True, False]
    assert checks[1]["measured"] == 3
    assert "A close" in summary_lines(result)[0]
    ordered = [(d["default"] == "WORSE", d["ok"]) for d in lost_first(duels("flux", [*rows, row("B", "x", 2.1, 1e-5)]))]
    assert ordered == [(True, False), *[(False, False)] * 1, *[(False, True)] * 3]
    worse = {"tables": {"flux": [*rows, row("B", "x", 2.1, 1e-5)]}}
    assert not verdicts(worse)[0]["ok"]
    assert "B x" in summary_lines(worse)[0]


def test_the_bench_is_json_and_its_tables_print(monkeypatch):
    monkeypatch.setattr(dit, "TRUTH", 8)
    monkeypatch.setattr(dit_peers, "SAMPLES", {"sd3": 1})
    monkeypatch.setattr(dit_peers, "CALIBRATION", (100,))
    few, many = dit_peers.rivals, dit_peers.ours
    monkeypatch.setattr(
        dit_peers, "rivals", lambda kind, ratios: [r for r in few(kind, ratios) if r.peer in ("FirstBlockCache", "MagCache")][:5]
    )
    monkeypatch.setattr(dit_peers, "ours", lambda kind: many(kind)[:3])
    result = dit_peers.bench(["sd3"], [0])
    data = json.loads(dumps(result))
    rows = data["tables"]["sd3"]
    assert [r["peer"] for r in rows[:4]] == ["exact", "tqai", "tqai", "tqai"]
    assert len(rows) == 1 + 3 + 5, "no row is left out"
    assert rows[2]["calls"] < 24
    assert rows[2]["held"] > 0
    assert any(r["failed"] for r in rows)
    assert data["verdicts"] == verdicts(result)
    for _, head, body in dit_peers.tables_of(result):
        assert all(len(line) == len(head) for line in body)


def test_the_shipped_result_names_its_machine_and_its_promises_are_recomputed(root):
    result = json.loads((root / "benchmarks/results/dit_peers.json").read_text())
    assert result["machine"]["threads"] == 1
    assert set(result["tables"]) == {"flux", "sd3", "wan", "photo"}
    assert result["verdicts"] == verdicts(result)
    assert result["duels"] == lost_first(duel for kind, rows in result["tables"].items() for duel in duels(kind, rows))
    for rows in result["tables"].values():
        assert all(r["failed"] or r["cpu"] > 0 for r in rows)
