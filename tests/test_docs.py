"""The README says what the results say, and its commands and names exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from bench import attention, calibrate, codec, dit, stream

import tqai_core as tqai

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_figures_are_those_of_the_results():
    assert subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, check=False).returncode == 0


def test_results_name_their_machine_and_their_promises_are_recomputed():
    for name, module in (("dit", dit), ("codec", codec), ("stream", stream), ("calibrate", calibrate), ("attention", attention)):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert result["machine"]["cpu"]
        assert result["machine"]["threads"] == 1
        again = (
            [v for kind, tables in result["tables"].items() for v in dit.verdicts(kind, _finite(tables))]
            if name == "dit"
            else module.verdicts(result)
        )
        assert again == result["verdicts"]


def _finite(thing):
    if isinstance(thing, dict):
        return {k: float("inf") if k == "psnr" and v is None else _finite(v) for k, v in thing.items()}
    return [_finite(v) for v in thing] if isinstance(thing, list) else thing


def test_every_method_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for names in tqai.methods().values():
        for name in names:
            assert f"`{name}`" in text, name


def test_readme_python_runs():
    """The snippets that need no model run as they stand."""
    import torch

    text = "".join(page.read_text() for page in PAGES)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(snippets) >= 3
    ran = 0
    for snippet in snippets:
        if re.search(r"\bpipe\b|\blm\b", snippet):
            continue
        names = {"tqai": tqai, "torch": torch, "x": torch.randn(2, 3, 40, 64)}
        lines = [line for line in snippet.splitlines() if "transformer" not in line]
        exec("\n".join(lines).replace("x.safetensors", "/dev/null"), names)
        ran += 1
    assert ran >= 2


def test_links_and_pictures_lead_somewhere():
    """Within the repository; a heading that a link names is there too."""
    for page in [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"https?:", link):
                continue
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                heads = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
                assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, f"{page.name}: {link}"
            if name.endswith((".png", ".gif", ".jpg")):
                assert target.stat().st_size > 200, link
