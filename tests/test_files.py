"""Files of others: each kind of damage that was met is refused in a sentence, before it is used; files of version 0.1 are read."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tqai_core as tqai
from tqai_core.calibrate.file import Calibration
from tqai_core.calibrate.page import page
from tqai_core.calibrate.sampler import CalibratedSampler
from tqai_core.codecs.bases import BasesFile
from tqai_core.errors import TqaiError
from tqai_core.files import DEEPEST, model_config, parse_json, read_json, read_tensors
from tqai_core.plot import Svg
from tqai_core.scorers import fisher

OLD = Path(__file__).parent / "old"
SCRIPT = "<script>alert(1)</script>"


def changed(name, path, tensors=None, header=None):
    """A copy of a file of ``old`` at ``path``; ``tensors`` and ``header`` change theirs in place."""
    with safe_open(str(OLD / name), "pt") as f:
        metadata, had = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    if header is not None:
        field = next(field for field in ("tqai", "tqai-kv", "tqai-calibration") if field in metadata)
        data = json.loads(metadata[field])
        header(data)
        metadata[field] = json.dumps(data)
    if tensors is not None:
        tensors(had)
    save_file({key: x.contiguous().clone() for key, x in had.items()}, str(path), metadata)
    return path


def refused(read, *words):
    with pytest.raises(TqaiError) as error:
        read()
    for word in words:
        assert word in str(error.value)


def lm_config():
    return pytest.importorskip("transformers").Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )


# -- JSON


@pytest.mark.parametrize(
    "text, word",
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
        ('{"sink": NaN}', "finite"),
        ('{"sink": -Infinity}', "finite"),
        ('{"sink": 1e999}', "finite"),
        ('{"sink": 1' + "0" * 5000 + "}", "64 bits"),
        ('"\\ud800"', "surrogates"),
        ('{"a": "' + "x" * 1_000_000 + '"}', "at most"),
    ],
)
def test_json_is_bounded_before_it_is_parsed(text, word):
    with pytest.raises(TqaiError, match=word):
        parse_json(text, what="config", again="write it again")


def test_depth_counts_brackets_outside_of_strings():
    assert parse_json('{"a": "' + "[" * 100 + '\\""}', what="x", again="y") == {"a": "[" * 100 + '"'}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, what="x", again="y")
    refused(lambda: parse_json("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), what="x", again="y"), "nested")
    start = time.process_time()
    refused(lambda: parse_json('"\\"' * 300_000 + "[" * 40, what="x", again="y"))
    assert time.process_time() - start < 2


def test_a_byte_order_mark_is_skipped(tmp_path):
    text = (OLD / "config.json").read_text()
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert tqai.Config.from_dict(read_json(path, what="config", again="x")) == tqai.Config.from_json("\ufeff" + text)
    study = tmp_path / "s.json"
    study.write_bytes(b"\xef\xbb\xbf" + (OLD / "study.json").read_bytes())
    assert page(study) == page(OLD / "study.json").replace("study.json", "s.json")


def test_what_is_no_file_is_refused_in_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none", "a\0b", "x" * 5000):
        refused(lambda path=path: read_json(path, what="config", again="write it again"), "write it again")
        refused(lambda path=path: read_tensors(path, what="file", again="write it again"), "write it again")
    refused(lambda: read_json("/dev/zero", what="config", again="x"), "larger than 1,000,000")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"strategy_kwargs": 5}, "strategy_kwargs"),
        ({"scorer": [1]}, "scorer"),
        ({"scorer": {"name": "snr", "schedule": {"a": 1}}}, "schedule"),
        ({"level": ["model"]}, "level"),
        ({"version": 1.5}, "version"),
        ({"skip_layers": {"a": 1}}, "skip_layers"),
        ({"skip_layers": [[1]]}, "skip_layers"),
        ({"level": "kv", "sink": 2**40}, "sink"),
        ({"level": "kv", "sink": True}, "sink"),
        ({"monitor": "lyapunov:tau=nan"}, "finite"),
        ({"monitor": "lyapunov:tau=inf"}, "finite"),
        ({"strategy": {"name": "delta2", "slope_bits": 1e400}}, "slope_bits|finite"),
    ],
)
def test_fields_of_a_config_have_their_types_and_ranges(change, word):
    with pytest.raises(TqaiError, match=word):
        tqai.Config.from_dict({"strategy": "delta2", **change})


@pytest.mark.parametrize("given", ["0-999999999", ["0-999999999"], [10**30], "9" * 5000, ["0-9999"] * 9000, list(range(30_000)), [0.5]])
def test_skip_layers_builds_no_endless_range(given):
    start = time.process_time()
    refused(lambda: tqai.Config(skip_layers=given), "skip_layers", "numbers below 10,000")
    assert time.process_time() - start < 1


# -- tensors


@pytest.mark.parametrize("name", ["packed", "packed_trellis", "packed_exact"])
def test_a_shape_that_the_tensors_have_not_is_refused(name, tmp_path):
    for shape in ([2, 300, 31], [300, 2, 32], [600, 32], [2, 300, 32, 1], [], [2**40, 2**40], [0, 2**40], [2, 300, 2**31]):
        path = changed(f"{name}.safetensors", tmp_path / "x", header=lambda h, shape=shape: h.update(shape=shape))
        refused(lambda path=path: tqai.Packed.read(path), "save the tensor again")


def test_damaged_gains_and_means_are_refused(tmp_path):
    cases = {
        "span": (lambda t: t["span"].fill_(math.nan), "span"),
        "high": (lambda t: t["span"].copy_(torch.tensor([200.0, 0.1])), "gains"),
        "step": (lambda t: t["span"].copy_(torch.tensor([0.0, -1.0])), "gains"),
        "mean": (lambda t: t["mean"].fill_(math.inf), "mean"),
        "type": (lambda t: t.update(codes=t["codes"].to(torch.int16)), "codes"),
        "gone": (lambda t: t.pop("gain"), "gain"),
    }
    for name, (change, word) in cases.items():
        path = changed("packed.safetensors", tmp_path / name, tensors=change)
        refused(lambda path=path: tqai.Packed.read(path), word)
        refused(lambda path=path: tqai.Packed.from_bytes(path.read_bytes()), word)


def test_headers_of_tensors_are_bounded_before_the_library_reads_them(tmp_path):
    nan = b'{"x": {"dtype": "F32", "shape": [NaN]}}'
    for header in (b"[" * 100_000, b'{"__metadata__": 5}', b'{"__metadata__": {"tqai": 5}}', b"[]", nan):
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        refused(lambda path=path: tqai.Packed.read(path), "save the tensor again")
        refused(lambda path=path: tqai.Packed.from_bytes(path.read_bytes()), "save the tensor again")
    large = json.dumps({"__metadata__": {"tqai": " " * 16_000_000}}).encode()  # the library takes ten times as much
    (tmp_path / "x.safetensors").write_bytes(len(large).to_bytes(8, "little") + large)
    refused(lambda: tqai.Packed.read(tmp_path / "x.safetensors"), "no header")
    (tmp_path / "x.safetensors").write_bytes((2**62).to_bytes(8, "little"))
    refused(lambda: tqai.Packed.read(tmp_path / "x.safetensors"), "header")


def test_a_step_of_a_stream_is_checked_against_the_one_before(tmp_path):
    coder, x = tqai.StreamCoder("choice", bits=(4, 0)), torch.randn(2, 40, 16)
    first, second = coder.encode(x, 1.0), coder.encode(x * 0.9, 0.9)
    assert len(coder.decode([first, second])) == 2
    for meta, tensors in (
        ({"at": "x"}, {}), ({"bits": 99}, {}), ({"key": 1}, {}), ({"dtype": "int8"}, {}), ({}, {"weights": None}),
        ({}, {"choice": torch.zeros(1, 3, dtype=torch.uint8)}), ({"at": None}, {}),
    ):  # fmt: skip
        held = {k: v for k, v in {**second.tensors, **tensors}.items() if v is not None}
        packed = tqai.Packed(second.codec, second.shape, held, {**second.meta, **meta})
        refused(lambda packed=packed: coder.decode([first, packed]), "save the tensor again")
    refused(lambda: coder.decode([first, tqai.Packed(second.codec, (2**39,), second.tensors, second.meta)]), "shape")


# -- calibrations


def test_damaged_bases_are_refused(tmp_path):
    with safe_open(str(OLD / "calibration.safetensors"), "pt") as f:
        metadata = f.metadata()
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    bases = json.loads(metadata["tqai-bases"])
    stream, place = next((name, i) for name, heads in bases["streams"].items() for i, runs in enumerate(heads) if runs is not None)
    scale, matrix, good = f"{stream}/{place}/scale", f"{stream}/{place}/matrix", bases["streams"][stream][place]
    d = len(tensors[scale])
    cases = [
        ([[0, d]], {}), ([[0, d, 9]], {}), ([[0, d, 0]], {}), ([[0, 2**62, 4]], {}), ([[0, d // 2, 4]], {}), ([], {}), ("x", {}),
        ([[0, 0, 1], [0, d, 4]], {}), (good, {scale: tensors[scale] * 0}), (good, {scale: tensors[scale] * math.nan}),
        (good, {matrix: tensors[matrix] * 2}), (good, {matrix: tensors[matrix][:, :-1]}), (good, {matrix: tensors[matrix].float()}),
    ]  # fmt: skip
    for runs, change in cases:
        bases["streams"][stream][place] = runs
        held = {key: x.contiguous() for key, x in {**tensors, **change}.items()}
        save_file(held, str(tmp_path / "b"), {**metadata, "tqai-bases": json.dumps(bases)})
        refused(lambda: BasesFile.load(tmp_path / "b"), "calibrate again")


def test_a_fisher_table_has_an_importance_for_each_step(tmp_path):
    sigmas = torch.tensor([0.9, 0.1])
    for number, tensors in enumerate((
        {"fisher": torch.zeros(2, 2, 2, 2), "sigmas": sigmas}, {"fisher": torch.ones(2, 2, 2, 2) * 3e38, "sigmas": sigmas},
        {"fisher": torch.ones(0, 2, 2, 2), "sigmas": sigmas}, {"fisher": torch.ones(2, 2, 2, 2), "sigmas": sigmas * math.nan},
        {"fisher": torch.ones(2, 2, 2, 2, dtype=torch.int32), "sigmas": sigmas}, {"fisher": torch.ones(2, 2, 2, 2), "sigmas": sigmas[:1]},
        {"fisher": torch.ones(2, 2, 2, 2), "sigmas": sigmas, "damage": torch.full((2, 2, 2, 2, 4), math.inf)},
    )):  # fmt: skip
        path = tmp_path / f"{number}"
        save_file(tensors, str(path))
        refused(lambda path=path: fisher.load(str(path)))
    save_file({"fisher": torch.ones(2, 2, 2, 2), "sigmas": sigmas}, str(tmp_path / "h"), {"tqai-calibration": "[1]"})
    refused(lambda: fisher.load(str(tmp_path / "h")), "fisher table")


def test_a_header_of_a_calibration_has_every_field_that_the_page_shows(tmp_path):
    header = json.loads(safe_open(str(OLD / "calibration.safetensors"), "pt").metadata()["tqai-calibration"])
    for field in header:
        path = changed("calibration.safetensors", tmp_path / "c", header=lambda h, field=field: h.pop(field))
        refused(lambda path=path: page(path))
    path = changed("calibration.safetensors", tmp_path / "c", tensors=lambda t: t["bits"].fill_(0))
    refused(lambda: Calibration.load(path), "bits")


def test_fields_of_a_sampler_are_checked(sampler_file):
    path = sampler_file()
    whole = json.loads(path.read_text())
    for change in (
        {"held_out": {}}, {"guidance": {**whole["guidance"], "low": "x"}}, {"guidance": {**whole["guidance"], "low": 9.0}}, {"calls": "6"},
        {"difference": "{"}, {"extra": 1}, {"seeds": []}, {"nodes": [1.0] * 2000}, {"model_class": None}, {"models": {"transformer": 5}},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | change))
        refused(lambda: CalibratedSampler.load(path), "config" if "difference" in change else "calibrate again")


# -- pages and studies


def strings(data, at=()):
    """The place of each text in plain data, keys of dicts included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, str):
            yield (*at, key)
        yield from strings(value, (*at, key))


def test_no_field_of_a_file_becomes_a_script_of_the_page(tmp_path):
    """Each text of a study and of a calibration in turn: refused, or shown as it is written."""
    whole = json.loads((OLD / "study.json").read_text())
    header = json.loads(safe_open(str(OLD / "calibration.safetensors"), "pt").metadata()["tqai-calibration"])
    shown = 0
    for file, data in (("study.json", whole), ("calibration.safetensors", header)):
        for place in strings(data):

            def put(data, place=place):
                for key in place[:-1]:
                    data = data[key]
                data[place[-1]] = SCRIPT

            path = tmp_path / file
            if file == "study.json":
                copy = json.loads(json.dumps(whole))
                put(copy)
                path.write_text(json.dumps(copy))
            else:
                changed(file, path, header=put)
            try:
                text = page(path)
            except TqaiError:
                continue
            shown += "&lt;script" in text
            assert "<script" not in text, place
    assert shown >= 5
    copy = json.loads(json.dumps(whole))
    copy["settings"] = {SCRIPT: SCRIPT}
    path.with_name("k.json").write_text(json.dumps(copy))
    assert "<script" not in page(path.with_name("k.json"))


def test_no_name_of_a_file_becomes_a_script_of_the_page(tmp_path):
    """Neither that of the page's own file nor one that a pipeline names; pictures write every word and attribute as text."""
    whole = json.loads((OLD / "study.json").read_text())
    table = "fisher:file=<script>alert(1).safetensors"
    for config in (whole["config"], whole["tuned"], *(row["config"] for row in whole["trials"])):
        config["scorer"] = table
    for name in ("<script>.json", "<img src=x onerror=alert(1)>.json"):
        (tmp_path / name).write_text(json.dumps(whole))
        text = page(tmp_path / name)
        assert "fisher:file=&lt;script" in text
        assert not re.search("<script|<img", text)
    svg = Svg(10, 10)
    svg.text(0, 0, SCRIPT)
    svg.dot(0, 0, "#000", title=SCRIPT)
    svg.add("path", d=f'"/>{SCRIPT}')
    assert "<script" not in str(svg)


def test_a_study_names_no_trials_that_are_not_there(tmp_path):
    whole, path = json.loads((OLD / "study.json").read_text()), tmp_path / "s.json"
    proof = {"error": 1e-4, "calls": 0.5, "bytes": 100.0, "time": 0.5}
    for change, word in (
        ({"front": [10**6]}, "front"), ({"proof": {"default": proof, "tuned": proof}, "kept": None}, "kept"), ({"trials": 5}, "trials"),
        ({"tuned": {"strategy": "nope"}}, "unknown strategy"), ({"budget": {"what": "calls", "limit": 0.0}}, "limit"),
    ):  # fmt: skip
        path.write_text(json.dumps({key: value for key, value in {**whole, **change}.items() if value is not None}))
        refused(lambda: page(path), word)


def test_a_foreign_database_is_refused_and_not_changed(tmp_path):
    from tqai_core.calibrate import tune
    from tqai_core.hosts import calibration_targets

    pytest.importorskip("optuna")
    foreign = tmp_path / "photos.db"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE photos (name TEXT)")
        database.execute("INSERT INTO photos VALUES ('x')")
    database.close()
    trigger = tmp_path / "trigger.db"
    shutil.copy(OLD / "study.db", trigger)
    with sqlite3.connect(trigger) as database:
        database.execute("CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END")
    database.close()
    text = tmp_path / "text.db"
    text.write_text("not a database at all, but a letter to a friend")
    for path in (foreign, trigger, text):
        before = path.read_bytes()
        refused(lambda path=path: tune.load_study(path), "no study of tqai tune")
        refused(lambda path=path: tune.tune(calibration_targets.demo("flux", count=1, steps=16), tune.Budget("calls", 0.6), path, trials=1))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(path.name)] == [path.name]


def test_reading_a_study_does_not_change_it(tmp_path):
    pytest.importorskip("optuna")
    path = tmp_path / "s.db"
    shutil.copy(OLD / "study.db", path)
    path.chmod(0o444)
    before = path.read_bytes()
    assert "Pareto" in page(path)
    assert path.read_bytes() == before
    for statement in ("UPDATE trial_user_attributes SET value_json = '{\"x\": NaN}'", "UPDATE trials SET state = 'WHAT'"):
        path.chmod(0o644)
        path.write_bytes(before)
        with sqlite3.connect(path) as database:
            database.execute(statement)
        database.close()
        refused(lambda: page(path), "study")


# -- caches


@pytest.mark.parametrize(
    "tensors, header, word",
    [
        (lambda t: t["layers.0.mean"].fill_(math.nan), None, "mean"),
        (lambda t: t["layers.0.scale"].zero_(), None, "scale"),
        (lambda t: t["layers.0.segments.0.gain_k"].fill_(math.inf), None, "gain_k"),
        (lambda t: t["layers.1.keys"].fill_(3e38), None, "keys"),
        (lambda t: t.pop("layers.0.scale"), None, "scale"),
        (lambda t: t.pop("layers.0.segments.0.codes_v"), None, "codes_v"),
        (lambda t: t.update({"layers.0.keys": t["layers.0.keys"].transpose(1, 2)}), None, "values"),
        (lambda t: t.update({"layers.0.mean": t["layers.0.mean"].transpose(1, 2)}), None, "mean"),
        (lambda t: t.update({"layers.0.pads": torch.full_like(t["layers.0.keys"][:, 0, 0, 0], -1, dtype=torch.int64)}), None, "pads"),
        (lambda t: t.update({"layers.0.pads": torch.zeros(len(t["layers.0.keys"]) + 1, dtype=torch.int64)}), None, "pads"),
        (lambda t: t.update({"layers.0.pads": torch.zeros(len(t["layers.0.keys"]))}), None, "pads"),
        (None, lambda h: h["layers"][0].update(moved=True), "pads"),
        (None, lambda h: h["layers"][0].update(length=10**6), "length"),
        (None, lambda h: h["layers"][0].update(segments=2), "segments.1"),
        (None, lambda h: h["layers"][0].update(bits_v=[4, 2]), "basis"),
        (None, lambda h: h["layers"][0].pop("plan"), "plan"),
        (None, lambda h: h["layers"][0]["plan"].update(sink=-1), "sink"),
        (None, lambda h: h["layers"].pop(), "layers"),
        (None, lambda h: h["config"].update(recent="x"), "recent"),
        (None, lambda h: h.update(model=5), "model"),
    ],
)
def test_a_damaged_cache_is_refused_by_field(tensors, header, word, tmp_path):
    path = changed("cache.safetensors", tmp_path / "k", tensors, header)
    refused(lambda: tqai.KVCache.load(path, lm_config()), word)


def test_pads_of_a_whole_cache_are_refused(tmp_path):
    """Rows moved behind the sinks need tokens that are none."""

    def moved(tensors):
        length = json.loads(safe_open(str(OLD / "cache.safetensors"), "pt").metadata()["tqai-kv"])["layers"][0]["length"]
        tensors["layers.0.pads"] = torch.full((len(tensors["layers.0.keys"]),), length)

    path = changed("cache.safetensors", tmp_path / "k", moved, lambda h: h["layers"][0].update(moved=True))
    refused(lambda: tqai.KVCache.load(path, lm_config()), "pads")


def test_a_damaged_layer_that_is_held_exact_is_refused_too(tmp_path):
    config = lm_config()
    cache = tqai.KVCache(config, tqai.Config(level="kv", skip_layers=(1,)))
    for layer in range(2):
        cache.update(torch.randn(1, 2, 8, 32), torch.randn(1, 2, 8, 32), layer)
    cache.save(tmp_path / "whole")
    assert tqai.KVCache.load(tmp_path / "whole", config).get_seq_length() == 8
    with safe_open(str(tmp_path / "whole"), "pt") as f:
        metadata, whole = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    for name, tensor in (("keys", whole["layers.1.keys"] * math.nan), ("values", whole["layers.1.values"][:, :, :-1].contiguous())):
        save_file({**whole, f"layers.1.{name}": tensor}, str(tmp_path / "k"), metadata)
        refused(lambda: tqai.KVCache.load(tmp_path / "k", config), name)


@pytest.mark.parametrize(
    "name, tensors, header, word",
    [
        ("cache_palm", lambda t: t["layers.0.policy.tier"].fill_(2), None, "tier"),
        ("cache_palm", lambda t: t.pop("layers.0.policy.tier"), None, "tier"),
        ("cache_palm", lambda t: t.update({"layers.0.policy.x": torch.zeros(1)}), None, "policy.x"),
        ("cache_palm", lambda t: t["layers.0.policy.scorer.mean"].fill_(math.inf), None, "scorer.mean"),
        ("cache_palm", None, lambda h: h["layers"][0].pop("policy"), "policy"),
        ("cache_palm", None, lambda h: h["layers"][0]["policy"].update(lead=10**9), "policy"),
        ("cache_palm", None, lambda h: h["layers"][0]["policy"].update(read=[5, 1]), "policy"),
        ("cache_palm", None, lambda h: h["layers"][0]["policy"]["decisions"][0].update(why=5), "why"),
        ("cache_window", lambda t: t.pop("layers.0.policy.codes"), None, "codes"),
        ("cache_window", lambda t: t.update({"layers.0.policy.gain": t["layers.0.policy.gain"][:, :, :3]}), None, "gain"),
        ("cache_window", lambda t: t["layers.0.policy.queries"].fill_(math.nan), None, "queries"),
    ],
)
def test_a_damaged_policy_of_a_cache_is_refused_by_field(name, tensors, header, word, tmp_path):
    path = changed(f"{name}.safetensors", tmp_path / "k", tensors, header)
    refused(lambda: tqai.KVCache.load(path, lm_config()), word)


@pytest.mark.parametrize("text", ["5", "[]", "{}" * 2, '{"num_layers": NaN}', '{"num_layers": {"a": [[1]]}}', json.dumps({"a" * 300: 1})])
def test_a_minis_configuration_is_plain_names_and_numbers(text):
    assert model_config({"config": '{"num_layers": 4, "axes_dims_rope": [4, 6], "qk_norm": null}'})["num_layers"] == 4
    refused(lambda: model_config({"config": text}), "install tqai-core again")


# -- version 0.1


def test_files_of_version_0_1_are_read():
    norms = json.loads((OLD / "norms.json").read_text())
    for name in ("packed", "packed_trellis", "packed_exact"):
        packed = tqai.Packed.read(OLD / f"{name}.safetensors")
        assert float(tqai.codec(packed.codec).decode(packed, torch.float32).norm()) == pytest.approx(norms[f"{name}.safetensors"][0])
    for name in ("cache", "cache_palm", "cache_window", "cache_tiered"):
        cache = tqai.KVCache.load(OLD / f"{name}.safetensors", lm_config())
        found = [float(layer.kv.dense(which).norm()) for layer in cache.packed_layers for which in "kv"]
        assert found == pytest.approx(norms[f"{name}.safetensors"]), name
    config = tqai.Config.from_json((OLD / "config.json").read_text())
    assert (config.scorer, config.strategy, config.monitor) == ("snr", "tiered", "lyapunov:tau=0.1")
    assert config.skip_layers == (-1, 0, 2, 3, 4, "blocks.3")
    kv = tqai.Config.from_json((OLD / "config_kv.json").read_text())
    assert (kv.level, kv.codec, kv.sink, kv.recent, kv.calibrate) == ("kv", "turbo:bits_k=4,bits_v=2", 2, 32, 64)
    made = Calibration.load(OLD / "calibration.safetensors")
    assert made.header["class"] == "FluxTransformer2DModel"
    assert made.bases.streams
    assert CalibratedSampler.load(OLD / "sampler.json").steps == 6
    for name in ("study.json", "study.db", "calibration.safetensors"):
        assert re.search("<svg", page(OLD / name)), name


def test_the_core_alone_does_not_import_pydantic():
    code = "import sys, tqai_core as t; t.preset('balanced'); t.codec('turbo'); assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
