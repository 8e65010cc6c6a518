"""The workflows' API twins against the schemas of our nodes; test_nodes_server.py runs them on real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "workflows" / "api"
TWINS = sorted(FOLDER.glob("*.json"))


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
            elif options and node["class_type"] != "TQAILoadPipeline":
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
