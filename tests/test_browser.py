"""The page: our JavaScript under node, and the real ComfyUI page in a browser in front of the fake host.

`make browser` fetches what the second part needs; test_nodes_server.py does the same in front of a real server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODE = shutil.which("node")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = os.pathsep.join(filter(None, [os.environ.get("NODE_PATH"), str(ROOT / "out/browser/node_modules")]))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def missing() -> str | None:
    """What a browser test lacks here."""
    if NODE is None:
        return "no node"
    if CHROMIUM is None:
        return "no chromium (CHROMIUM names one; on Debian: apt install chromium)"
    found = subprocess.run([NODE, "-e", "require('playwright-core')"], env={**os.environ, "NODE_PATH": MODULES}, capture_output=True)
    if found.returncode:
        return "no playwright-core (make browser)"
    absent = [name for name in ("aiohttp", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
    return f"no {' and '.join(absent)} (make browser)" if absent else None


def drive(**job: Any) -> dict[str, Any]:
    """Let page.cjs do a job in the browser; what it saw."""
    assert NODE is not None
    run = subprocess.run(
        [NODE, str(ROOT / "tests/browser/page.cjs")], input=json.dumps({"chromium": CHROMIUM, "types": ["TQAICompress", "KSampler"], **job}),
        env={**os.environ, "NODE_PATH": MODULES}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert "failed" not in seen, (seen["failed"], seen["errors"])
    return seen


def check_run(seen: dict[str, Any], steps: int) -> None:
    """Before, while and after a sampling, as the page shows it."""
    (before,), (during,), (after,) = seen["before"], seen["during"], seen["after"]
    assert (before["head"], before["cells"], before["visible"]) == ("not run yet", [], True)
    assert during["state"] == "active"
    assert during["head"].startswith("active")
    assert after["visible"]
    assert after["head"] == f"active, done: step {steps} of {steps}"
    assert len(after["cells"]) == steps
    assert after["cells"][:3] == ["computed"] * 3
    assert after["cells"][-1] == "computed"
    skipped = after["cells"].count("forecast")
    assert skipped > 0
    assert after["figures"].startswith(f"skipped {skipped} (")
    assert "error not" not in after["figures"]
    assert "at most" in after["figures"]
    assert after["why"] == "last step"
    (text,) = seen["text"]
    assert f"| {steps} |" in text
    for kind, values in seen["saved"]:
        assert len(values) == {"TQAICompress": 5, "TQAIReport": 0}.get(kind, len(values)), "the panel is saved with the workflow"
    for node in seen["prompt"].values():
        assert not [name for name in node["inputs"] if name.startswith("tqai_")]


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
def page(host):
    why = missing()
    if why:
        pytest.skip(why)
    if host.real or host.version != "0.33.0":
        pytest.skip("the page of a real server is tested in test_nodes_server.py; one fake profile is enough here")
    import web_server

    with web_server.Server(host) as server:
        yield server


def test_every_workflow_opens_in_the_page_as_its_twin(page):
    seen = drive(url=f"http://127.0.0.1:{page.port}/", open={p.stem: json.loads(p.read_text()) for p in WORKFLOWS})
    assert seen["errors"] == []
    for path in WORKFLOWS:
        assert seen["missing"][path.stem] == []
        sent = {key: {k: node[k] for k in ("class_type", "inputs")} for key, node in seen["prompts"][path.stem].items()}
        assert sent == json.loads((path.parent / "api" / path.name).read_text()), path.stem
    # the dropdowns of methods show their own options
    assert seen["widgets"]["sd35_txt2img"]["13"][1:] == ["monitor", *(f"monitor.{o}" for o in ("tau", "warmup", "max_gap", "min_steps"))]


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_the_live_panel(page, nodes2):
    workflow = json.loads((ROOT / "workflows/flux_txt2img.json").read_text())
    before = len(page.prompts)
    seen = drive(url=f"http://127.0.0.1:{page.port}/", run={"name": "flux", "ui": workflow}, vue=nodes2)
    assert seen["errors"] == []
    assert seen["vue"] is nodes2
    check_run(seen, 24)
    assert len(page.prompts) == before + 1
