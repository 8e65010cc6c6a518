"""The real ComfyUI page in a headless browser (tests/browser/page.cjs), and what it must show."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NODE = shutil.which("node")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = os.pathsep.join(filter(None, [os.environ.get("NODE_PATH"), str(ROOT / "out/browser/node_modules")]))


def no_browser() -> str | None:
    """What a test in a browser lacks here."""
    if NODE is None:
        return "no node"
    if CHROMIUM is None:
        return "no chromium (CHROMIUM names one; on Debian: apt install chromium)"
    found = subprocess.run([NODE, "-e", "require('playwright-core')"], env={**os.environ, "NODE_PATH": MODULES}, capture_output=True)
    return "no playwright-core (make browser)" if found.returncode else None


def missing() -> str | None:
    """What a test with ComfyUI's own page lacks here."""
    if (why := no_browser()) is not None:
        return why
    absent = [name for name in ("aiohttp", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
    return f"no {' and '.join(absent)} (make browser)" if absent else None


def drive(**job: Any) -> dict[str, Any]:
    """Let page.cjs do a job in the browser; what it saw."""
    seen = _node("page.cjs", {"types": ["TQAICompress", "KSampler"], **job})
    assert "failed" not in seen, (seen["failed"], seen["errors"])
    return seen


def look(pages: dict[str, Path], folder: Path | None = None, schemes: Sequence[str] = ("light", "dark")) -> list[dict[str, Any]]:
    """What sheet.cjs saw of pages of ours, narrow and wide; pictures of them into ``folder``."""
    urls = {name: path.resolve().as_uri() for name, path in pages.items()}
    return _node("sheet.cjs", {"pages": urls, "widths": [400, 1400], "schemes": [*schemes], "folder": folder and str(folder)})


def _node(script: str, job: dict[str, Any]) -> Any:
    assert NODE is not None
    run = subprocess.run(
        [NODE, str(ROOT / "tests/browser" / script)], input=json.dumps({"chromium": CHROMIUM, **job}),
        env={**os.environ, "NODE_PATH": MODULES}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


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
    assert "error up to" in after["figures"]
    assert "at most" in after["figures"]
    assert after["why"] == "last step"
    (text,) = seen["text"]
    assert str(steps) in text.split()
    assert "|" not in text, "a table is shown as a table"
    for kind, values in seen["saved"]:
        assert len(values) == {"TQAICompress": 5, "TQAIReport": 0}.get(kind, len(values)), "the panel is saved with the workflow"
    for node in seen["prompt"].values():
        assert not [name for name in node["inputs"] if name.startswith("tqai_")]
