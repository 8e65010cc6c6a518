"""A real ComfyUI server with our pack in custom_nodes: the workflows' API twins, live events, errors, interrupt."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif("TQAI_COMFYUI" not in os.environ, reason="needs a real ComfyUI")
ROOT = Path(__file__).resolve().parents[1]
TWINS = ("flux_txt2img", "sd35_txt2img", "wan22_ti2v_5b", "wan22_a14b", "compare", "save_pipeline", "load_pipeline")
MODELS = {"flux1": "flux", "sd3.5": "sd35m", "ti2v": "wan22_5b", "high_noise": "wan_14b_high", "low_noise": "wan_14b_low"}
SHAPES = {"flux": "1,16,16,16", "sd35m": "1,16,16,16", "wan22_5b": "1,48,3,8,8", "wan_14b_high": "1,16,3,8,8"}


class Server:
    def __init__(self, base: str) -> None:
        self.base = base

    def get(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def run(self, graph: dict[str, Any], limit: float = 240) -> dict[str, Any]:
        """The history entry of a finished prompt, or the server's complaint."""
        answer = self.get("/prompt", {"prompt": graph})
        if "prompt_id" not in answer or answer.get("node_errors"):
            return answer
        until = time.time() + limit
        while time.time() < until:
            entry = self.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
            if entry and entry["status"].get("completed") is not None:
                return entry
            time.sleep(0.2)
        raise TimeoutError(graph)


@pytest.fixture(scope="module")
def server(host, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    for name in ("custom_nodes", "models/diffusion_models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "tqai").symlink_to(ROOT)
    (base / "custom_nodes" / "support.py").write_text((ROOT / "tests/comfyui/support_nodes.py").read_text())
    for file in host.folder.glob("*.safetensors"):
        (base / "models/diffusion_models" / file.name).symlink_to(file)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (base / "log.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-auto-launch"],
        cwd=os.environ["TQAI_COMFYUI"], stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    made = Server(f"http://127.0.0.1:{port}")
    try:
        for _ in range(600):
            assert process.poll() is None, (base / "log.txt").read_text()[-4000:]
            try:
                if "TQAICompress" in made.get("/object_info"):
                    break
            except OSError:
                time.sleep(0.3)
        made.log = lambda: (base / "log.txt").read_text()
        made.output = base / "output"
        made.input = base / "input"
        yield made
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def shrink(name: str) -> dict[str, Any]:
    """A twin with tiny checkpoints: random prompts and latents in place of encoders and decoders, 18 steps."""
    graph = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text())
    model = next(v for k, v in MODELS.items() if k in str(graph["1"]["inputs"]))
    width, pooled = {"flux": (64, 64), "sd35m": (4096, 2048)}.get(model, (4096, 0))
    for i, node in list(graph.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "UNETLoader":
            inputs["unet_name"] = f"tiny_{next(v for k, v in MODELS.items() if k in inputs['unet_name'])}.safetensors"
        elif kind == "CheckpointLoaderSimple":
            graph[i] = {"class_type": "UNETLoader", "inputs": {"unet_name": f"tiny_{model}.safetensors", "weight_dtype": "default"}}
        elif kind == "CLIPTextEncode":
            graph[i] = {"class_type": "TestConditioning", "inputs": {"seed": int(i), "width": width, "pooled": pooled}}
        elif i == "6":
            graph[i] = {"class_type": "TestLatent", "inputs": {"shape": SHAPES[model]}}
        elif kind in ("VAELoader", "VAEDecode", "SaveImage", "SaveAnimatedWEBP") or "CLIPLoader" in kind:
            del graph[i]
        elif kind.startswith("KSampler"):
            inputs["steps"] = 18 if "noise_seed" not in inputs else 24
            if inputs.get("end_at_step") == 15:
                inputs["end_at_step"] = 12
            if inputs.get("start_at_step") == 15:
                inputs["start_at_step"] = 12
    for node in graph.values():  # links to what is gone
        gone = [name for name, link in node["inputs"].items() if isinstance(link, list) and link[0] not in graph]
        node["inputs"] = {name: link for name, link in node["inputs"].items() if name not in gone}
    if "21" in graph:  # nothing would ask for the exact picture
        graph["36"] = {"class_type": "TQAIReport", "inputs": {"samples": ["21", 0]}}
    return graph


def test_the_pack_loads_and_says_next_to_nothing(server):
    log = server.log()
    assert not [line for line in log.splitlines() if "IMPORT FAILED" in line and "custom_nodes" in line]
    lines = [line for line in log.splitlines() if "tqai" in line and "seconds" not in line and "/tqai" not in line]
    assert len(lines) <= 1, lines
    info = server.get("/object_info")
    assert info["TQAICompress"]["category"] == "tqai"
    assert info["TQAICompress"]["search_aliases"]
    for path in ("/extensions/tqai/docs/TQAICompress.md", "/i18n"):
        assert "TQAI" in str(server.get(path))
    assert server.get("/i18n")["de"]["nodeDefs"]["TQAIReport"]["display_name"] == "TQAI Bericht"


@pytest.mark.shows("bundled workflows on a running server")
@pytest.mark.parametrize("name", TWINS)
def test_a_workflow_runs(server, name):
    entry = server.run(shrink(name))
    assert entry.get("status", {}).get("status_str") == "success", entry
    text = "".join(entry["outputs"]["30"]["text"])
    samplers = 2 if name == "wan22_a14b" else 1
    assert text.count("### ") == samplers
    assert entry["outputs"]["33"]["images"], "the chart is a picture"
    assert "calls" in text
    if name == "wan22_a14b":
        assert text.index("sampler 20") < text.index("sampler 60")
    if name == "compare":
        assert "has run before this node" in "".join(entry["outputs"]["36"]["text"])
    if name == "save_pipeline":
        assert json.loads((server.output / "tqai" / "shared.json").read_text())["monitor"] == "lyapunov:tau=0.04"


def test_a_second_prompt_takes_the_sampler_from_the_cache_and_still_reports(server):
    graph = shrink("flux_txt2img")
    first = server.run(graph)
    second = server.run(graph)
    assert second["status"]["status_str"] == "success"
    if "30" in second["outputs"]:
        assert second["outputs"]["30"]["text"] == first["outputs"]["30"]["text"]


@pytest.mark.parametrize(
    "node, name, value, word",
    [
        ("10", "preset", "nope", "preset"),
        ("10", "level", "kv", "level"),
        ("14", "layers", "5 8", "numbers, ranges or module names"),
        ("13", "monitor.tau", 99.0, "tau"),
        ("11", "strategy", "nope", "this strategy is unknown here: choose one of delta"),
    ],
)
def test_bad_input_is_refused_with_a_reason(server, node, name, value, word):
    graph = shrink("sd35_txt2img")
    graph[node]["inputs"][name] = value
    answer = json.dumps(server.run(graph))
    assert "Traceback" not in answer.partition('"traceback"')[0]
    assert word in answer
    assert '"status_str": "success"' not in answer


def test_two_compress_nodes_are_a_clear_error(server):
    graph = shrink("flux_txt2img")
    graph["99"] = {"class_type": "TQAICompress", "inputs": {**graph["10"]["inputs"], "model": ["10", 0]}}
    graph["20"]["inputs"]["model"] = ["99", 0]
    assert "already went through TQAI Compress: remove one" in json.dumps(server.run(graph))


@pytest.mark.shows("interrupt from the page: the next run is clean")
def test_interrupt_leaves_a_clean_server(server):
    graph = shrink("wan22_ti2v_5b")
    graph["20"]["inputs"].update(steps=400, seed=7)
    answer = server.get("/prompt", {"prompt": graph})
    for _ in range(200):
        time.sleep(0.1)
        if server.get("/queue")["queue_running"]:
            break
    time.sleep(2)
    server.get("/interrupt", {})
    for _ in range(300):
        entry = server.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
        if entry:
            break
        time.sleep(0.2)
    assert "interrupted" in json.dumps(entry["status"])
    after = server.run(shrink("wan22_ti2v_5b"))
    assert after["status"]["status_str"] == "success"


@pytest.mark.shows("live panel in the page, classic canvas and Nodes 2.0")
@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_the_page_shows_a_trained_model_live(server, nodes2, tmp_path):
    """The Flux workflow with the trained mini draws digits. PICTURE names a file for the README's picture (Nodes 2.0)."""
    import mini
    import page

    why = page.missing()
    if why:
        pytest.skip(why)
    mini.prompts(server.input)
    graph = mini.graph(seed=int(nodes2))  # the same prompt again would come from the cache, unseen
    ui = json.loads((ROOT / "workflows/flux_txt2img.json").read_text())
    places = {str(node["id"]): node["pos"] for node in ui["nodes"]}
    places |= {"3": [0, 130], "4": [0, 260], "6": [0, 390], "8": [340, 130], "10": [340, 250], "20": [720, 0], "30": [1040, 0]}
    places |= {"31": [1040, 480], "32": [1400, 0], "33": [1400, 370]}
    picture = os.environ.get("PICTURE")
    if picture and not nodes2:
        picture = str(Path(picture).with_stem(Path(picture).stem + "-canvas"))
    seen = page.drive(
        url=server.base, run={"name": "flux", "api": graph, "places": places}, vue=nodes2, picture=picture, size=[1600, 900],
        types=["TQAICompress", "KSampler", "TestDigits"],
    )  # fmt: skip
    assert seen["vue"] is nodes2
    page.check_run(seen, 24)
    assert not [e for e in seen["errors"] if "tqai" in e]
