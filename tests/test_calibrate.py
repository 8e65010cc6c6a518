"""Calibration: what is measured, what is written, what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import tqai_core as tqai
from tqai_core import minis
from tqai_core.calibrate import policy, run
from tqai_core.calibrate.basis import Moments
from tqai_core.calibrate.file import FIELD, WIDTHS, Calibration
from tqai_core.calibrate.fisher import Sums, probe
from tqai_core.cli import main
from tqai_core.files import write_tensors
from tqai_core.hosts import calibration_targets as targets
from tqai_core.hosts.attention_interceptor import blocks_of, checkpointed, intercept_attention
from tqai_core.registry import build
from tqai_core.types import Step


def small(kind="flux"):
    return targets.demo(kind, count=1, steps=4, bands=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "flux.safetensors"
    target = small()
    return target, path, run.calibrate(target, path, seeds=(100,))


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "lm"])
def test_taps_show_attention_and_leave_the_model_as_it_was(kind):
    target = small(kind)
    _, call = target.record(1)[0]
    seen = []
    with torch.no_grad():
        exact = call()
        with checkpointed(target.model), intercept_attention(target.model, lambda i, q, k, v: seen.append((i, k.shape)) or (k, v)):
            assert torch.equal(call(), exact)
        with intercept_attention(target.model, lambda i, q, k, v: (k, v * 0 if i == 1 else v)):
            assert not torch.equal(call(), exact)
        assert torch.equal(call(), exact)
    assert [i for i, _ in seen] == list(range(len(blocks_of(target.model))))
    assert len({shape for _, shape in seen}) == 1
    assert not [name for name, module in target.model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("kind", ["sd3", "lm"])
def test_probes_predict_what_a_small_error_costs(kind):
    """The mean over probes is e'J'GJe, here against two forward passes."""
    target = small(kind)
    codecs = {bits: build("codec", f"turbo:bits={bits}") for bits in WIDTHS}
    band, call = target.record(1)[-1]
    heads = {"sd3": 3, "lm": 2}[kind]
    sums = Sums(len(blocks_of(target.model)), heads, len(target.sigmas))
    for i in range(24):
        probe(target, band, call, sums, codecs, torch.Generator().manual_seed(i))
    damage = sums.tables()["damage"][1, 0, :, band, 5]

    def coded(which):
        def change(layer, q, k, v):
            kv = [k, v]
            if layer == 1:
                whole = codecs[6].decode(codecs[6].encode(kv[which]))
                kv[which] = torch.cat([whole[:, :1], kv[which][:, 1:]], 1)
            return kv

        return change

    with torch.no_grad():
        exact = call()
        for which in (0, 1):
            with intercept_attention(target.model, coded(which)):
                true = target.damage(call(), exact) / len(exact)
            factor = 0.5 if kind == "lm" else 1.0  # KL is half the quadratic form
            assert true / 2.5 < factor * float(damage[which]) < true * 2.5
    assert not [p for p in target.model.parameters() if p.grad is not None]


def test_the_file_holds_what_was_measured_and_knows_its_model(made):
    target, path, calibration = made
    again = Calibration.load(path, target.model)
    assert again.header["seeds"] == [100]
    assert again.header["samples"] == [2, 2]  # one sample, cond and uncond
    for name, x in calibration.tensors.items():
        assert torch.equal(again.tensors[name], x), name
    fisher, error, damage = (again.tensors[name] for name in ("fisher", "error", "damage"))
    assert fisher.shape == (4, 1, 2, 2)
    assert bool((error.diff(dim=-1) < 0).all()), "more bits, less error"
    assert bool((damage[..., 7] < damage[..., 1]).all())
    verdicts = [v for heads in again.header["verdicts"]["bases"].values() for v in heads]
    assert all(v["kept"] == ("klt" if v["klt"] < v["hadamard"] else "hadamard") for v in verdicts), "the nearer on held-out vectors"
    assert any(v["kept"] == "klt" for v in verdicts)
    other = targets.demo("sd3").model
    with pytest.raises(ValueError, match="belongs to model"):
        Calibration.load(path, other)
    with pytest.raises(ValueError, match="belongs to model"):
        again.bases.check(other)


def test_methods_read_the_same_file(made):
    _, path, calibration = made
    scorer = build("scorer", {"name": "fisher", "file": str(path)})
    assert scorer.heads(0, 0.5).shape == (1, 2)
    codec = tqai.codec({"name": "trellis", "basis": str(path)})
    x = torch.randn(2, 1, 68, 128)
    assert codec.decode(codec.encode(x, stream="0/k")).shape == x.shape
    assert list(calibration.bases.streams) == [f"{i}/{kind}" for i in range(4) for kind in "kv"]


def test_a_pipeline_reads_its_own_file_and_no_other(made):
    target, path, _ = made
    plain = tqai.Config(monitor="lyapunov:tau=0.1,min_steps=1", codec="trellis:bits=4", strategy="delta2:slope_bits=4")
    with_file = tqai.Config.from_dict(plain.to_dict() | {"codec": f"trellis:basis={path}"})
    scored = tqai.Config.from_dict(plain.to_dict() | {"scorer": f"fisher:file={path}"})
    target = targets.demo("flux", count=1, steps=24)
    out = {name: target.run(1, config) for name, config in (("plain", plain), ("bases", with_file), ("fisher", scored))}
    assert torch.equal(out["plain"][0], out["bases"][0]), "outputs of steps have no calibrated axes"
    calls = {name: [d["action"] for d in report.decisions] for name, (_, _, report) in out.items()}
    assert calls["fisher"] != calls["plain"], "the tolerance follows the table"
    assert "forecast" in calls["plain"]
    other = targets.demo("sd3").pipe
    for config in (with_file, scored):
        with pytest.raises(ValueError, match="model"):
            tqai.apply(other, config)
        assert not hasattr(other.transformer, "_diffusers_hook")


def test_streams_with_axes_of_their_own_use_them(tmp_path):
    from bench import bases

    from tqai_core.memory import Memory
    from tqai_core.types import Part, Where

    mixing = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    draw = lambda n: (torch.randn(2, n, 64) * torch.logspace(0, -2, 64)) @ mixing
    file, _ = bases.calibrate({"attn.0/out": draw(4000).flatten(0, 1)[None]}, 4)
    file.save(tmp_path / "b")
    memory = Memory(tqai.codec({"name": "trellis", "basis": str(tmp_path / "b")}))
    x, error = draw(100), {}
    for site in ("attn.0", "attn.1"):
        stream = memory[Where(site)]
        stream.hold({"value": Part(x), "slope": Part(x, 3)}, x, Step(0, 1.0))
        error[site] = float((stream.value("value") - x).square().sum())
        assert stream.value("slope").shape == x.shape
    assert error["attn.0"] < error["attn.1"] / 4


def test_damaged_partial_and_foreign_files_are_refused(made, tmp_path):
    _, path, _ = made
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    text = blob[8 : 8 + size].replace(b'\\"complete\\": true', b'\\"complete\\":false')
    cases = {
        "cut": (blob[: len(blob) // 2], "not a readable"),
        "noise": (b"\x00" * 100, "not a readable"),
        "partial": (blob[:8] + text + blob[8 + size :], "stopped"),
    }
    for name, (content, why) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=why):
            Calibration.load(tmp_path / name)
    with pytest.raises(ValueError, match="is not there"):
        Calibration.load(tmp_path / "nothing")


def test_a_stopped_calibration_goes_on_where_it_was(tmp_path):
    class Stop(Exception):
        pass

    def progress(text, part):
        if "102" in text:
            raise Stop

    ways = {}
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        run.calibrate(small(), path, seeds=(100, 102), progress=progress)
    partial = tmp_path / "a.safetensors.partial"
    assert not path.exists()
    assert partial.exists()
    with pytest.raises(ValueError, match="stopped"):
        Calibration.load(partial)
    with pytest.raises(ValueError, match="other settings"):
        run.calibrate(small(), path, seeds=(100, 103))
    seen = []
    ways["resumed"] = run.calibrate(small(), path, seeds=(100, 102), progress=lambda text, part: seen.append(text))
    assert not any("seed 100" in text for text in seen), "the finished seed is not run again"
    assert not partial.exists()
    ways["straight"] = run.calibrate(small(), tmp_path / "b.safetensors", seeds=(100, 102))
    for name, x in ways["straight"].tensors.items():
        assert torch.allclose(x.float(), ways["resumed"].tensors[name].float(), rtol=1e-5), name


def test_a_damaged_stopped_calibration_is_not_gone_on_with(tmp_path):
    """The file lies beside the output, and anybody may have put it there."""
    basis_moments = {f"moments/{name}": x for name, x in moments_of_one_run().items()}
    settings = {
        "model": "0" * 16, "class": "X", "kind": "diffusion", "family": "flux", "seeds": [100], "probes": 1, "codec": "turbo",
        "basis_bits": 4, "average": 3, "steps": 4,
    }  # fmt: skip
    header = {"format": 1, "complete": False, "done": 1, "sigmas": [0.9, 0.4], **settings}
    tensors = basis_moments | {f"sums/{name}": x for name, x in vars(Sums(1, 2, 2)).items()}
    path, target = tmp_path / "a.partial", SimpleNamespace()
    go_on = lambda: run._resume(path, settings, target)
    write_tensors(path, tensors, {FIELD: json.dumps(header)})
    assert go_on()[2] == 1
    assert target.sigmas == (0.9, 0.4)
    gone = {name: x for name, x in tensors.items() if name != "sums/damage"}
    moment = next(iter(basis_moments))
    for changed, held in (
        ({"done": -1}, {}), ({"done": "1"}, {}), ({"sigmas": "x"}, {}), ({"sigmas": []}, {}), ({"complete": True}, {}), ({"seeds": 5}, {}),
        ({}, gone), ({}, {**tensors, "sums/error": tensors["sums/error"].float()}), ({}, {**tensors, moment: tensors[moment].double()}),
        ({}, {**tensors, moment: tensors[moment] / 0}), ({}, {**tensors, "moments/x": tensors[moment].clone()}),
    ):  # fmt: skip
        write_tensors(path, held or tensors, {FIELD: json.dumps(header | changed)})
        with pytest.raises(tqai.TqaiError):
            go_on()


def moments_of_one_run():
    moments, g = Moments(), torch.Generator().manual_seed(3)
    moments.see(0, *(torch.randn(1, 2, 20, 16, generator=g) for _ in "qkv"))
    return {name: x.contiguous() for name, x in moments.sums.items()}


@pytest.mark.parametrize(
    "wrong, why",
    [(dict(seeds=()), "one or more"), (dict(seeds=(104,)), "kept for the verdicts"), (dict(probes=0), "probes")],
)
def test_settings_are_checked(wrong, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        run.calibrate(small(), tmp_path / "x", **wrong)


def test_water_filling_spends_the_budget_where_it_helps():
    damage = 4.0 ** -torch.arange(1, 9).float() * torch.tensor([1.0, 256.0]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 1, 1)
    bits = policy.water_fill(damage, 4)
    assert bits.float().mean() == 4
    assert bool((bits[0, 1] == 6).all()), "256 times the damage: four bits more"
    assert bool((bits[0, 0] == 2).all())
    assert bool((policy.water_fill(damage * 0 + 1, 3).float().mean() <= 3).all())
    with pytest.raises(ValueError, match="average"):
        policy.water_fill(damage, 9)


def test_a_losing_allocation_is_dropped_and_the_file_says_so():
    target = small()
    target.record(1)
    damage = torch.ones(4, 1, 2, 2, 8) * torch.arange(8.0).flip(0)
    damage[0] *= 1e6  # all bits into one layer
    bits, verdict = policy.allocate(target, damage, 4, "turbo", (1,), (2,))
    assert verdict["kept"] == "uniform"
    assert bool((bits == 4).all())
    assert verdict["fisher"]["loss"] > verdict["uniform"]["loss"] / policy.MARGIN
    assert verdict["fisher"]["bytes"] <= verdict["uniform"]["bytes"]


def test_command_on_folders(tmp_path, capsys, byte_tokenizer):
    folder = tmp_path / "lm"
    minis.lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text("def f(x):\n    return x\n" * 60)
    command = ["calibrate", "-m", str(folder), "-o", str(tmp_path / "lm.safetensors"), "--seeds", "1", "--probes", "1"]
    assert main(command) == 2
    assert "--text" in capsys.readouterr().err
    assert main([*command, "--text", str(tmp_path / "text"), f"--json={tmp_path / 'o.json'}"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["verdicts"]["bases"]["of"] == 16
    keys = Calibration.load(tmp_path / "lm.safetensors").tensors
    assert keys["mean"].shape == keys["scale"].shape == (4, 2, 64)
    assert main(["calibrate", "-m", str(tmp_path), "-o", str(tmp_path / "x")]) == 2
    assert "neither model_index.json" in capsys.readouterr().err


def test_command_on_a_pipeline_without_one_of_its_encoders(tmp_path, capsys, picture_folder):
    command = ["calibrate", "-m", str(picture_folder), "-o", str(tmp_path / "sd3.safetensors"), "--seeds", "1", "--probes", "1"]
    assert main([*command, f"--json={tmp_path / 'o.json'}"]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["verdicts"]["bases"]["of"] > 0
    assert Calibration.load(tmp_path / "sd3.safetensors").tensors
    assert main(["report", str(tmp_path / "sd3.safetensors"), "-o", str(tmp_path / "page.html")]) == 0
    assert "<svg" in (tmp_path / "page.html").read_text()
