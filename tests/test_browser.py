"""Pages: our JavaScript under node, our own pages in a browser, and the real ComfyUI page in a browser in front of the fake host.

`make browser` fetches what a browser needs; test_nodes_server.py does the last part in front of a real server.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import sample_pages
from page import NODE, check_run, drive, look, missing, no_browser

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


# -- pages that tqai writes


def browser():
    if (why := no_browser()) is not None:
        pytest.skip(why)


def test_pages_are_readable_narrow_and_wide_light_and_dark(tmp_path):
    """Nothing wider than the window, no text under 12 px, none cut or hard to see, no picture missing, nothing asked of the network."""
    browser()
    pages = {"demo": sample_pages.small_demo(tmp_path), **sample_pages.write_all(tmp_path)}
    (shots := ROOT / "out/shots").mkdir(parents=True, exist_ok=True)
    found = look(pages, shots)
    assert {(s["name"], s["width"], s["colorScheme"]) for s in found} == {
        (n, w, c) for n in pages for w in (400, 1400) for c in ("light", "dark")
    }
    for seen in found:
        which = (seen["name"], seen["width"], seen["colorScheme"])
        assert seen["wide"] <= seen["client"] == seen["width"], which
        for fault in ("small", "cut", "faint", "broken", "errors", "foreign"):
            assert seen[fault] == [], (which, fault)
        assert seen["scrolls"] == 0, (which, "what is too wide scrolls in itself")
        assert seen["dark"] == (seen["colorScheme"] == "dark"), which
        if seen["name"] == "demo":
            assert len(seen["clips"]) == 9
            assert len(set(seen["clips"])) == 1, "clips are in step"
            assert seen["svgs"] == 1, "the narrow chart or the wide one"


def test_a_page_that_is_hard_to_read_is_found(tmp_path):
    """The eyes of the test above: each fault in turn is seen."""
    browser()
    bodies = {
        "wide": "<div style='width:2000px'>a</div>", "small": "<p style='font-size:11px'>tiny</p>",
        "faint": "<p style='color:#aaa'>pale</p>", "broken": "<img src='none.png'>",
        "cut": "<div style='overflow:hidden;width:380px'><p style='white-space:nowrap'>" + "long " * 200 + "</p></div>",
        "svg": "<svg width=100 viewBox='0 0 200 40'><rect width=9 height=9 fill='#fff'/><text y=20 font-size=16>half</text></svg>",
    }  # fmt: skip
    for name, body in bodies.items():
        (tmp_path / f"{name}.html").write_text(f"<!doctype html><meta charset=utf-8><body style='background:#fff'>{body}")
    seen = {s["name"]: s for s in look({name: tmp_path / f"{name}.html" for name in bodies}, schemes=["light"]) if s["width"] == 400}
    assert seen["wide"]["wide"] > seen["wide"]["client"]
    assert seen["small"]["small"] == ["tiny"]
    assert seen["faint"]["faint"][0].startswith("pale: 2.")
    assert len(seen["broken"]["broken"]) == 1
    assert len(seen["cut"]["cut"]) == 1
    assert seen["svg"]["small"] == ["half"], "16 units at half the size"


def test_a_script_in_any_field_is_shown_and_does_not_run(tmp_path):
    browser()
    pages = sample_pages.write_all(tmp_path, sample_pages.SCRIPT)
    for seen in look(pages, schemes=["light"]):
        assert seen["title"] != "hacked"
        assert seen["errors"] == []
        if seen["name"] != "calibration":
            assert sample_pages.SCRIPT in seen["text"]


# -- ComfyUI's page


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
