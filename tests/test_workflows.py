"""The bundled workflows: their API twins fit our schemas and run on the fake host; what the page opens is the same graph.

test_nodes_server.py runs the twins on real ComfyUI, test_browser.py opens the workflows in the real page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tqai_core.metrics import psnr

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
TWINS = sorted(FOLDER.glob("api/*.json"))
ORDER = sorted(TWINS, key=lambda p: p.stem != "save_pipeline")  # the one that loads needs what that one saves


def test_each_workflow_has_a_twin():
    names = {p.stem for p in FOLDER.glob("*.json")}
    assert names == {p.stem for p in TWINS}
    assert len(names) >= 6


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_a_twin_fits_the_schemas(host, path):
    graph = json.loads(path.read_text())
    ours = {i: node for i, node in graph.items() if node["class_type"].startswith("TQAI")}
    assert ours
    for node in ours.values():
        inputs = node["inputs"]
        expected, choices = set(), {}
        for i in host.pack.NODE_CLASS_MAPPINGS[node["class_type"]].GET_SCHEMA().inputs:
            if i.id in inputs or not i.optional:
                expected.add(i.id)
            options = getattr(i, "options", None) or []
            if options and hasattr(options[0], "key"):
                chosen = {o.key: o for o in options}[inputs[i.id]]
                expected |= {f"{i.id}.{sub.id}" for sub in chosen.inputs}
                choices.update({f"{i.id}.{sub.id}": sub for sub in chosen.inputs})
            elif options and node["class_type"] not in ("TQAILoadPipeline", "TQAISampler"):
                assert inputs[i.id] in options
        assert set(inputs) == expected
        for name, widget in choices.items():
            low, high = getattr(widget, "min", None), getattr(widget, "max", None)
            assert low is None or low <= inputs[name] <= high
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in graph


def test_every_node_appears_in_a_workflow(host):
    used = {node["class_type"] for path in TWINS for node in json.loads(path.read_text()).values()}
    assert used >= host.pack.NODE_CLASS_MAPPINGS.keys()


def as_prompt(ui: dict[str, Any]) -> dict[str, Any]:
    """What the page sends for a saved workflow: links by number, widget values by place."""
    links = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    prompt = {}
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values: Iterator[Any] = iter(node.get("widgets_values", []))
        inputs = {}
        for i in node.get("inputs", []):
            if "widget" in i:
                inputs[i["name"]] = next(values)
                if i["name"] in ("seed", "noise_seed"):
                    assert next(values) == "fixed", "a seed of a bundled workflow must not change by itself"
            if i.get("link") is not None:
                inputs[i["name"]] = links[i["link"]]
        assert next(values, None) is None, f"{node['type']} has more values than widgets"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_the_workflow_is_its_twin(path):
    ui = json.loads((FOLDER / path.name).read_text())
    assert as_prompt(ui) == json.loads(path.read_text())
    assert any(node["type"] == "MarkdownNote" for node in ui["nodes"])
    told = json.dumps([node["widgets_values"] for node in ui["nodes"] if node["type"] == "MarkdownNote"])
    for node in ui["nodes"]:
        values = [v for v in node.get("widgets_values", []) if isinstance(v, str) and v.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert [m["name"] for m in models] == values, "the page offers the download of what it knows the address of"
        for m in models:
            assert m["url"].startswith("https://huggingface.co/")
            assert m["url"].endswith(m["name"])
            assert m["name"] in told


@pytest.mark.skipif("TQAI_COMFYUI" in os.environ, reason="test_nodes_server.py runs them on a real one")
def test_the_twins_run(host, sampler_file):
    """Every step of every sampler goes through tqai on a host of small models; pictures and latents are smaller, too."""
    import executor

    ours = host.pack.NODE_CLASS_MAPPINGS
    known, saved = executor.info(ours), []
    sampler_file(host.folder / "models/tqai/sd35.sampler.json")
    for path in ORDER:
        graph = json.loads(path.read_text())
        for node in graph.values():
            node["inputs"].update({k: v for k, v in {"width": 512, "height": 512}.items() if k in node["inputs"]})
        if path.stem == "load_pipeline":
            known = executor.info(ours)  # as after pressing R in the page
        assert executor.errors(graph, known, ours) == {}, path.stem
        events: list[tuple[str, dict[str, Any]]] = []
        results = executor.execute(graph, ours, lambda *event, told=events: told.append(event))["results"]
        if path.stem == "calibrated_sampler":
            assert results["20"][0]["samples"].isfinite().all()
            assert results["40"][2].startswith("6 steps for SD3Transformer2DModel")
            continue
        if path.stem == "flux2_klein_kv":
            (entry,) = json.loads(results["30"][3])
            assert (entry["node"], entry["sampler"], entry["evaluations"], entry["fallbacks"]) == ("10", "20", 4, [])
            assert 0 < entry["bytes_held_peak"] < entry["bytes_exact"] / 2
            continue
        samplers = [i for i, node in graph.items() if node["class_type"].startswith("KSampler")]
        (report,) = [i for i, node in graph.items() if node["class_type"] == "TQAIReport"]
        entries = json.loads(results[report][3])
        compressed = [i for i in samplers if graph[graph[i]["inputs"]["model"][0]]["class_type"] == "TQAICompress"]
        assert [e["sampler"] for e in entries] == sorted(compressed, key=int), path.stem
        for entry in entries:
            inputs = graph[entry["sampler"]]["inputs"]
            asked = min(inputs.get("end_at_step", inputs["steps"]), inputs["steps"]) - inputs.get("start_at_step", 0)
            assert entry["evaluations"] == asked
            assert entry["fallbacks"] == []
            assert entry["calls_skipped"] > 0, path.stem
        assert {data["node"] for event, data in events if event == "executed"} >= {report}
        if path.stem == "load_pipeline":
            assert results[graph["10"]["inputs"]["pipeline"][0]][0] == saved[0]
        if path.stem == "save_pipeline":
            saved.append(results["12"][0])
        if path.stem == "compare":
            plain, ours_ = results["21"][0]["samples"], results["20"][0]["samples"]
            assert 0 < (plain - ours_).abs().max() < 0.5 * plain.abs().max()
            assert entries[0]["exact"].keys() == {"latent", "picture"}
            assert entries[0]["exact"]["latent"]["psnr"] == pytest.approx(psnr(ours_, plain))
            assert 0 < results["30"][4].mean() < 0.5, "the difference of the pictures"


def test_a_comfyui_folder_is_made_ready_for_a_mini(tmp_path):
    """By the one command of the README: every file that the graph names is there, and nothing of the graph is unknown."""
    (tmp_path / "main.py").write_text("")
    run = [sys.executable, str(ROOT / "tests/comfyui/mini.py"), str(tmp_path)]
    made = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert all(Path(name).stat().st_size > 500 for name in made)
    graph = json.loads((tmp_path / "tqai_mini.json").read_text())
    named = {value for node in graph.values() for value in node["inputs"].values() if str(value).endswith(".safetensors")}
    assert named == {"mini_flux.safetensors", "tqai_mini_digits.safetensors"}
    assert named <= {Path(name).name for name in made}
    for node in graph.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    assert {"TQAICompress", "TQAIReport", "KSampler", "TestDigits"} <= {node["class_type"] for node in graph.values()}
    refused = subprocess.run([*run[:2], str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "give the folder of ComfyUI" in refused.stderr
