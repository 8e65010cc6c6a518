"""The page: our JavaScript under node, and the real ComfyUI page in a browser in front of the fake host.

`make browser` fetches what the second part needs; test_nodes_server.py does the same in front of a real server.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from page import NODE, check_run, drive, missing

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.mark.skipif(NODE is None, reason="no node")
@pytest.mark.parametrize("script", ["tqai.js", "panel.js"])
def test_scripts_parse(script, tmp_path):
    module = tmp_path / "script.mjs"  # node reads it as the page does
    module.write_text((ROOT / "web" / script).read_text())
    subprocess.run([str(NODE), "--check", str(module)], check=True)


@pytest.mark.skipif(NODE is None, reason="no node")
def test_the_panel_follows_the_events():
    run = subprocess.run([str(NODE), "--test", str(ROOT / "tests/browser/panel.test.mjs")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.fixture(scope="module")
def served(host):
    why = missing()
    if why:
        pytest.skip(why)
    if host.real or host.version != "0.33.0":
        pytest.skip("the page of a real server is tested in test_nodes_server.py; one fake profile is enough here")
    import web_server

    with web_server.Server(host) as server:
        yield server


def test_every_workflow_opens_in_the_page_as_its_twin(served):
    seen = drive(url=f"http://127.0.0.1:{served.port}/", open={p.stem: json.loads(p.read_text()) for p in WORKFLOWS})
    assert seen["errors"] == []
    for path in WORKFLOWS:
        assert seen["missing"][path.stem] == []
        sent = {key: {k: node[k] for k in ("class_type", "inputs")} for key, node in seen["prompts"][path.stem].items()}
        assert sent == json.loads((path.parent / "api" / path.name).read_text()), path.stem
    # the dropdowns of methods show their own options
    assert seen["widgets"]["sd35_txt2img"]["13"][1:] == ["monitor", *(f"monitor.{o}" for o in ("tau", "warmup", "max_gap", "min_steps"))]


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_the_live_panel(served, nodes2):
    workflow = json.loads((ROOT / "workflows/flux_txt2img.json").read_text())
    before = len(served.prompts)
    seen = drive(url=f"http://127.0.0.1:{served.port}/", run={"name": "flux", "ui": workflow}, vue=nodes2)
    assert seen["errors"] == []
    assert seen["vue"] is nodes2
    check_run(seen, 24)
    assert len(served.prompts) == before + 1
