"""Every kind of page, made small: for the tests that parse them and for those that look at them in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tqai_core import demo
from tqai_core.calibrate.page import page as report_page
from tqai_core.closeness import Comparison
from tqai_core.measure import Mini, tails
from tqai_core.pages import Shown
from tqai_core.report import Report
from tqai_core.run_page import page as run_page
from tqai_core.run_page import sheet

OLD = Path(__file__).parent / "old"
SCRIPT = "<script>document.title='hacked'</script>"
PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
    b"\x00\x00\x00\nIDATx\x9cc\xf8\x0f\x00\x01\x01\x01\x00\x1b\xb6\xeeV\x00\x00\x00\x00IEND\xaeB`\x82"
)


def decision(i: int, steps: int, word: str) -> dict[str, Any]:
    return {
        "step": i, "sigma": 1 - i / steps, "action": "forecast" if i > 3 and i % 2 else "compute",
        "error": 0.01 * (1 + i % 4) if i > 2 else None, "error_estimate": 0.02 * (1 + i % 3) if i > 3 else None, "tolerance": 0.05,
        "why": f"estimate within the tolerance{word}", "model": "m",
    }  # fmt: skip


def report(word: str = "", steps: int = 24) -> Report:
    because = [{"where": f"here{word}", "why": f"because{word}"}]
    decisions = [decision(i, steps, word) for i in range(steps)]
    return Report(48, 20, steps, decisions, warnings=[f"a warning{word}"], fallbacks=because)


def compared(word: str = "") -> str:
    """The page of ``tqai run --compare``. ``word`` is added to every text."""
    files = {name: [f"{name}{word}.png"] for name in ("tqai", "exact", "difference")}
    result = {
        "pipeline": f"Pipeline{word}", "prompt": f"a red fox in the snow{word}", "seed": 3, "seconds": 1.5, "files": files["tqai"],
        "compare": {"seconds": 3.0, "files": files["exact"]},
    }  # fmt: skip
    exact = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return run_page(result, Comparison.of([("picture", exact + 0.01, exact)]), files["difference"], report(word))


def tried(word: str = "") -> str:
    """A page of ``tqai try`` with every part that there is."""
    shown = [
        Shown.beside(f"{name}{word}", [f"1.5 s{word}", "40.2 dB"], ["tqai.png"], ["difference.png"])
        for name in ("exact", "balanced", "fast")
    ]
    texts = [("The exact cache wrote" + word, "def main():\n    return 1" + word)]
    tables = [("All settings" + word, ["setting", "seconds" + word], [["exact" + word, "1.5"], ["a long setting " * 12, "2.5"]])]
    paste = [("A script" + word, "import tqai_core as tqai" + word + "  # and a line that is as long as the lines of scripts are" * 4)]
    bars = [("exact" + word, 3.0, "3.00 s" + word), ("balanced", 1.5, "1.50 s")]
    return sheet(
        "tqai try: model" + word, "It helps: balanced is 2.00 times as fast." + word, "FluxPipeline: a red fox" + word, bars, shown,
        (shown[0], shown[1]), texts, tables, paste, report(word), ["a note" + word], "cpu, torch" + word,
    )  # fmt: skip


def studies(word: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Report pages of a study and a calibration; where ``word`` is given, of a study whose free texts hold it."""
    whole = json.loads((OLD / "study.json").read_text())
    if word:
        whole["settings"] = {key + word: f"{value}{word}" for key, value in whole["settings"].items()}
        for row in whole["trials"]:
            row["config"]["scorer"] = f"fisher:file={word}.safetensors"
    (folder / "study.json").write_text(json.dumps(whole))
    yield "study", report_page(folder / "study.json")
    yield "calibration", report_page(OLD / "calibration.safetensors")


def small_demo(out: Path, kind: str = "wan") -> Path:
    """The page of ``tqai demo`` with two clips, which run as one batch alone."""
    mini = Mini(kind)
    mini.schedule("euler", 1.0)
    runs = demo._runs(mini, [0, 1], 0)
    rows = {row["method"]: tails(row) for row in demo._rows(mini, runs)}
    (out / "index.html").write_text(demo.page([demo.section(mini, [0, 1], runs, rows, out)], "here"), encoding="utf-8")
    return out / "index.html"


def write_all(folder: Path, word: str = "") -> dict[str, Path]:
    """All but the demo as files, the pictures that they name beside them."""
    for name in ("tqai", "exact", "difference"):
        (folder / f"{name}.png").write_bytes(PNG)
    pages = {"compare": compared(word), "try": tried(word), **dict(studies(word, folder))}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}
