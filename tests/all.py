"""What `make test` leaves out, as far as this machine can run it: `make test-all`. Says at its end what was skipped and why.

The extra packages go into out/all, which sees those of the interpreter that runs this file: .venv stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/comfyui"))
from page import CHROMIUM, NODE  # noqa: E402

ENV = ROOT / "out/all"
PYTHON = ENV / "bin/python"


@dataclass
class Part:
    """``packages`` are installed first; ``missing`` says what this machine lacks, empty if nothing."""

    name: str
    tests: list[str]
    packages: list[str] = field(default_factory=list)
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)


PARTS = [
    Part("every causal LM class of transformers", ["tests/test_lm_matrix.py", "-m", "slow"]),
    Part("every pipeline of the bed", ["tests/test_pipelines.py", "-m", "slow"]),
    Part("mlx-lm", ["tests/test_mlx.py", "tests/test_doors.py", "-k", "mlx"], [".[mlx]"]),
    Part(
        "Triton's interpreter",
        ["tests/test_native.py", "tests/test_sparse.py", "-k", "triton"],
        ["triton"],
        "" if sys.platform == "linux" else "triton is built for Linux alone",
        {"TRITON_INTERPRET": "1", "TQAI_TRITON": "1"},
    ),
    Part("rival caches", ["tests/test_peers.py"], [".[peers]"]),
    Part(
        "the page in a browser",
        ["tests/test_browser.py"],
        [".[browser]"],
        "" if NODE and CHROMIUM and shutil.which("npm") else "needs node, npm and a chromium (CHROMIUM=path)",
    ),
    Part("engines of vLLM", ["tests/vllm"], missing="they have an environment of their own: make test-vllm"),
    Part(
        "a real ComfyUI",
        ["tests/test_comfyui.py"],
        missing="" if os.environ.get("COMFYUI_PATH") else "COMFYUI_PATH names no checkout (make test-comfyui fetches some)",
    ),
]


def install(packages: list[str]) -> str:
    """Empty, or the last line of what went wrong."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENV)], check=True)
        folder = next(ENV.glob("lib/python*/site-packages"))
        (folder / "parent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), *packages]
    run = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stderr.strip().splitlines()[-1] if run.returncode else ""


def go(part: Part) -> str:
    """ "passed", "failed", or "skipped: " with the reason."""
    if part.missing:
        return f"skipped: {part.missing}"
    if part.packages and (why := install(part.packages)):
        return f"skipped: {' '.join(part.packages)} cannot be installed: {why}"
    if part.name == "the page in a browser":
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", "out/browser", "playwright-core@1"], cwd=ROOT)
    python = str(PYTHON) if part.packages else sys.executable
    env = {**os.environ, **part.environment, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([python, "-m", "pytest", "-q", *part.tests], cwd=ROOT, env=env, check=False)
    return "failed" if run.returncode else "passed"


if __name__ == "__main__":
    found = {}
    for part in PARTS:
        print(f"\n== {part.name}", flush=True)
        found[part.name] = go(part)
    print("\n" + "\n".join(f"{name}: {what}" for name, what in found.items()))
    sys.exit("failed" in found.values())
