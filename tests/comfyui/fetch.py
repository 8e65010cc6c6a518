"""Fetch a tagged ComfyUI and what it needs to run on a CPU, for ``make test-comfyui``. Needs git and the internet.

    python tests/comfyui/fetch.py v0.33.0 out/comfyui/v0.33.0

Prints nothing but errors; the checkout gets its own ``.venv``. A second call with the same folder does nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

URL = "https://github.com/Comfy-Org/ComfyUI"
TORCH = "https://download.pytorch.org/whl/cpu"  # the default wheels bring GBs of CUDA
PACKAGES = ("torch", "torchvision", "torchaudio")
TESTS = ("pytest", "hypothesis", "diffusers>=0.42", "scikit-learn", "rich")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def fetch(tag: str, folder: Path) -> None:
    done = folder / ".venv" / "tqai-ready"
    if done.exists():
        return
    if not (folder / "comfyui_version.py").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run("git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", tag, URL, str(folder))
    run(sys.executable, "-m", "venv", str(folder / ".venv"))
    pip = [str(folder / ".venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--index-url", TORCH, *PACKAGES)
    wanted = (folder / "requirements.txt").read_text().splitlines()
    rest = [line for line in wanted if line.strip() and not line.startswith("#") and re.split(r"[^\w-]", line)[0] not in PACKAGES]
    run(*pip, "requests", *rest, *TESTS)
    done.touch()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    fetch(sys.argv[1], Path(sys.argv[2]))
