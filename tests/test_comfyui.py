"""Runs the node tests on real ComfyUI checkouts, one process each: ``COMFYUI_PATH=~/ComfyUI-0.33.0:~/ComfyUI-0.27.0``.

What they showed is printed as the README's table (``pytest -s``) and lies in out/comfyui.json, or where COMFYUI_RESULT says.

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
    from bench.harness import machine

    versions = dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])], reverse=True))
    whole = {"machine": machine(), "versions": versions}
    file = Path(os.environ.get("COMFYUI_RESULT", ROOT / "out/comfyui.json"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"\n{readme.comfyui(whole)}\n")


@pytest.mark.skipif(not PATHS, reason="COMFYUI_PATH names no ComfyUI checkout (make test-comfyui fetches one)")
@pytest.mark.parametrize("path", PATHS or ["none"])
def test_on_real_comfyui(path, result, tmp_path):
    checkout = Path(path).expanduser().resolve()
    assert (checkout / "comfyui_version.py").exists(), f"{checkout} is no ComfyUI checkout"
    shown = tmp_path / "shown.json"
    env = {**os.environ, "TQAI_COMFYUI": str(checkout), "TQAI_SHOWN": str(shown)}
    env.pop("COMFYUI_PATH")
    run = subprocess.run([python(checkout), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], cwd=ROOT, env=env, check=False)
    version = re.findall(r'"(.*)"', (checkout / "comfyui_version.py").read_text())[-1]
    result[version] = json.loads(shown.read_text())
    assert run.returncode == 0
