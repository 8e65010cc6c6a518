"""Runs the node tests on real ComfyUI checkouts, one process each: ``COMFYUI_PATH=~/ComfyUI-0.33.0:~/ComfyUI-0.27.0``.

What they showed is printed as the README's table (``pytest -s``) and lies in out/comfyui.json, or where COMFYUI_RESULT says. The first
checkout also runs every model of setups.py, whose rows lie in out/comfyui_breadth.json, or where COMFYUI_BREADTH says.

The interpreter is the checkout's own ``.venv`` or ``venv``, else the one of ``COMFYUI_PYTHON``, else this one. See
tests/comfyui/fetch.py for a checkout with everything that the tests need.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PATHS = [p for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/test_nodes.py",
    "tests/test_nodes_levels.py",
    "tests/test_nodes_real.py",
    "tests/test_nodes_server.py",
    "tests/test_nodes_sampler.py",
    "tests/test_nodes_parametrisation.py",
    "tests/test_nodes_cache.py",
    "tests/test_nodes_half_size.py",
    "tests/test_nodes_breadth.py",
)


def python(checkout: Path) -> str:
    for name in (".venv", "venv"):
        if (path := checkout / name / "bin" / "python").exists():
            return str(path)
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def result():
    """Rows by version, the newest first; written and printed when all checkouts are through."""
    found: dict[str, Any] = {}
    yield found
    sys.path.append(str(ROOT / "benchmarks"))
    import readme

    versions = dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])], reverse=True))
    whole = _write("COMFYUI_RESULT", "comfyui.json", {"versions": versions})
    print(f"\n{readme.comfyui(whole)}\n")


def _write(variable: str, name: str, content: dict[str, Any]) -> dict[str, Any]:
    from bench.harness import machine

    whole = {"machine": machine(), **content}
    file = Path(os.environ.get(variable, ROOT / "out" / name))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


@pytest.mark.skipif(not PATHS, reason="COMFYUI_PATH names no ComfyUI checkout (make test-comfyui fetches one)")
@pytest.mark.parametrize("path", PATHS or ["none"])
def test_on_real_comfyui(path, result, tmp_path):
    checkout = Path(path).expanduser().resolve()
    assert (checkout / "comfyui_version.py").exists(), f"{checkout} is no ComfyUI checkout"
    shown = tmp_path / "shown.json"
    env = {**os.environ, "TQAI_COMFYUI": str(checkout), "TQAI_SHOWN": str(shown)}
    env.pop("COMFYUI_PATH")
    rows = tmp_path / "rows.json"
    if path == PATHS[0]:
        env["TQAI_BREADTH"] = str(rows)
    run = subprocess.run([python(checkout), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], cwd=ROOT, env=env, check=False)
    version = re.findall(r'"(.*)"', (checkout / "comfyui_version.py").read_text())[-1]
    result[version] = json.loads(shown.read_text())
    if rows.exists():
        _write("COMFYUI_BREADTH", "comfyui_breadth.json", {"version": version, "rows": json.loads(rows.read_text())})
    assert run.returncode == 0
