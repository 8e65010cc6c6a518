"""Fetch a tagged ComfyUI and what it needs to run on a CPU, for ``make test-comfyui``. Needs git and the internet.

    python tests/comfyui/fetch.py v0.33.0 out/comfyui/v0.33.0

Prints nothing but errors; the checkout gets its own ``.venv``. A second call with the same folder does nothing, and a folder
that holds a checkout already is only given the rest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
URL = "https://github.com/Comfy-Org/ComfyUI"
TORCH = "https://download.pytorch.org/whl/cpu"  # the default wheels bring GBs of CUDA
PACKAGES = ("torch", "torchvision", "torchaudio")
TESTS = ("pytest", "hypothesis", "diffusers", "scikit-learn", "rich")

# Where that index is out of reach, the package index has torchvision for CUDA alone. Beside a CPU torch it fails at the two
# operators for which it registers fakes; nothing here calls them.
SITE = '''"""Declares the operators that torchvision's own library would, where that one cannot be loaded."""
import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            Finder.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                Finder.library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Finder())
'''
SILENT = ("torchaudio", "torchaudio/functional", "torchaudio/transforms")  # imported by ComfyUI at start, used for sound alone


def run(*command: str) -> bool:
    return subprocess.run(command, check=False).returncode == 0


def need(*command: str) -> None:
    if not run(*command):
        sys.exit(f"failed: {' '.join(command)}")


def install_torch(python: str, pip: list[str]) -> None:
    """``pip`` holds the pin of torch: another package must not bring another one."""
    quick = ["--retries", "1", "--timeout", "15"]
    if subprocess.run([*pip, *quick, "--index-url", TORCH, *PACKAGES], capture_output=True, check=False).returncode == 0:
        return
    need(*pip, "torch")
    need(*pip, "numpy", "pillow")
    need(*pip, "--no-deps", "torchvision")
    folder = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    (folder / "sitecustomize.py").write_text(SITE)
    for name in SILENT:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").touch()
    need(python, "-c", "import torchvision, torchaudio.functional")


def fetch(tag: str, folder: Path) -> None:
    done = folder / ".venv" / "tqai-ready"
    if done.exists():
        return
    if not (folder / "comfyui_version.py").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        need("git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", tag, URL, str(folder))
    need(sys.executable, "-m", "venv", str(folder / ".venv"))
    python = str(folder / ".venv/bin/python")
    pins = folder / ".venv" / "torch.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins.write_text("\n".join(line for line in lines if line.startswith("torch")))  # the rest follows ComfyUI's own pins
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
    install_torch(python, pip)
    wanted = (folder / "requirements.txt").read_text().splitlines()
    rest = [line for line in wanted if line.strip() and not line.startswith("#") and re.split(r"[^\w-]", line)[0] not in PACKAGES]
    need(*pip, "requests", *rest)
    need(*pip, "-c", str(ROOT / "constraints.txt"), *TESTS)
    done.touch()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    fetch(sys.argv[1], Path(sys.argv[2]))
