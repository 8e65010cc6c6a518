"""Runs the node tests on real ComfyUI checkouts, one process each: ``COMFYUI_PATH=~/ComfyUI-0.33.0:~/ComfyUI-0.27.0``.

The interpreter is the checkout's own ``.venv`` or ``venv``, else the one of ``COMFYUI_PYTHON``, else this one. See
tests/comfyui/fetch.py for a checkout with everything that the tests need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not PATHS, reason="COMFYUI_PATH names no ComfyUI checkout (make test-comfyui fetches one)")
@pytest.mark.parametrize("path", PATHS or ["none"])
def test_on_real_comfyui(path):
    checkout = Path(path).expanduser().resolve()
    assert (checkout / "comfyui_version.py").exists(), f"{checkout} is no ComfyUI checkout"
    env = {**os.environ, "TQAI_COMFYUI": str(checkout)}
    env.pop("COMFYUI_PATH")
    run = subprocess.run([python(checkout), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], cwd=ROOT, env=env, check=False)
    assert run.returncode == 0
