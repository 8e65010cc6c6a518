"""The README says what the results say, and its commands and names exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import figures
import pytest
import sources
from bench import attention, calibrate, codec, default, dit, dit_kv, few, levels, llm, llm_real, llm_speed, rolling, sampler, stream, vllm
from bench.harness import child, closing, medians, promises

import tqai_core as tqai

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_figures_are_those_of_the_results_and_no_number_is_without_a_source():
    run = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "bench",
    [dit, default, codec, stream, calibrate, attention, levels, llm, llm_real, sampler, dit_kv, few, rolling, llm_speed, vllm],
    ids=lambda bench: bench.__name__,
)
def test_results_name_their_machine_and_their_promises_are_recomputed(bench):
    result = json.loads((RESULTS / f"{bench.__name__.split('.')[-1]}.json").read_text())
    assert result["machine"]["cpu"]
    assert result["machine"]["threads"] == 1
    if bench in (dit, levels, sampler):
        again = [v for kind, tables in result["tables"].items() for v in bench.verdicts(kind, _finite(tables))]
    else:
        again = bench.verdicts(result)
    assert again == result["verdicts"]
    last = list(bench.tables_of(_finite(result)))[-1]
    assert last[0] == "promises"
    assert [row[-1] for row in last[2]] == sorted(row[-1] for row in last[2]), "those that fail come first"


def test_a_promise_fails_beyond_its_bound_and_where_nothing_was_measured():
    out = []
    need = promises(out, "flux")
    need("kept", 2.0, least=2)
    need("missed", 2.0, most=1)
    need("unknown", None, most=1)
    assert [v["ok"] for v in out] == [True, False, False]
    assert out[1] == {"what": "missed", "measured": 2.0, "needed": "<= 1", "ok": False, "mini": "flux"}
    ((_, head, rows),) = closing({"verdicts": out})
    assert [row[1] for row in rows] == ["missed", "unknown", "kept"]
    assert len(head) == len(rows[0])


def test_medians_leave_names_and_gaps_alone():
    rows = [{"method": "a", "x": 1.0, "y": None}, {"method": "a", "x": 5.0, "y": None}, {"method": "a", "x": 2.0, "y": None}]
    assert medians(rows) == {"method": "a", "x": 2.0, "y": None}


def test_a_child_process_finds_the_benches_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    found = child("import bench.peers, tqai_core\nfound = {'at': tqai_core.__file__, 'given': sys.argv[1:]}", "x")
    assert found["given"] == ["x"]
    assert Path(found["at"]) == Path(tqai.__file__)
    with pytest.raises(RuntimeError, match="no good"):
        child("raise ValueError('no good')")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 2.3x as fast.", ["2.3x"]),
        ("It has 17 % less error\nand 3.1 dB more.", ["17", "3.1"]),
        ("It has a quarter less error.", ["quarter"]),
        ("Use 24 steps, seeds 0, 1, 2 and 8 + 3 bits (arXiv 2502.17423).", []),
        ("`Config(tau=0.06)`\n```python\nx = 3.14\n```", []),
        ("<!-- codec -->\n| 9.9 |\n<!-- /codec -->", []),
    ],
)
def test_a_number_without_a_source_is_found(monkeypatch, tmp_path, text, found):
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "PAGES", [page])
    monkeypatch.setattr(sources, "SOURCES", [])
    assert [re.search(r": '(.*?)' in", line)[1] for line in sources.unsourced()] == found


def test_a_measured_figure_in_a_docstring_is_found(monkeypatch, tmp_path):
    path = tmp_path / "method.py"
    docstring = '"""Adds one of 24 bits. It has .73 of the error."""'
    path.write_text(f'class A:\n    {docstring}\n\n    x: int = param(3, "saves 12 % of the time")\n\nY = 0.5\n')
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "PAGES", [])
    monkeypatch.setattr(sources, "SOURCES", [path])
    assert [line.split("'")[1] for line in sources.unsourced()] == [".73", "12"]


def test_figures_are_written_into_sentences_whatever_their_line_breaks(monkeypatch):
    known = [("a", "it has {} to {} times the error", ["1.10", "2.20"]), ("a", "no such {}", ["1"])]
    monkeypatch.setattr(figures, "sentences", lambda: iter(known))
    texts = {"a": "Once it has .9\n    to 1.4 times the\n    error. And 1.4."}
    assert figures.fill(texts) == ["a: no such {}"]
    assert texts["a"] == "Once it has 1.10\n    to 2.20 times the\n    error. And 1.4."
    assert figures.fill(dict(texts)) == ["a: no such {}"]


def test_the_wheel_has_the_minis_of_the_demo_and_no_laboratory():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tools["packages"]["find"]["include"] == ["tqai_core", "tqai_core.*"]
    weights = {Path(name).stem for name in tools["package-data"]["tqai_core"] if name.endswith(".safetensors")}
    assert weights == {"flux", "wan", "lm"}
    assert all((ROOT / "tqai_core" / "minis" / f"{name}.safetensors").exists() for name in weights)


def _finite(thing):
    if isinstance(thing, dict):
        return {k: float("inf") if k.startswith("psnr") and v is None else _finite(v) for k, v in thing.items()}
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


def test_the_bar_of_a_packed_step_is_the_fastest_dense_row_and_rivals_that_were_not_run_are_no_broken_promise():
    result = json.loads((RESULTS / "llm.json").read_text())
    dense = [r["ms"] for r in result["step"] if r["tokens"] == 16384 and "packed" not in r["method"]]
    packed = next(r["ms"] for r in result["step"] if r["tokens"] == 16384 and r["method"] == "packed, native")
    found = {v["what"]: v["measured"] for v in llm.verdicts(result)}
    assert found["step at 16k, native: times the speed of the fastest dense"] == min(dense) / packed
    alone = llm.verdicts(
        {**result, "quality": [r for r in result["quality"] if r["cache"].startswith("tqai k") or r["cache"] == "DynamicCache"]}
    )
    assert len(alone) == len(found) - 2
    assert all(v["measured"] is not None for v in alone)


def test_no_sampler_of_comfyui_is_behind_fewer_steps_at_equal_calls():
    """By more than half a dB; one that would be is left exact, and the row says why."""
    rows = json.loads((RESULTS / "samplers.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"flux", "sd3", "wan"}
    behind = [row for row in rows if row["fewer"] is not None and row["ours"] < row["fewer"] - 0.5]
    silent = [row for row in rows if row["fewer"] is None and not (row["calls"] == row["whole"] and row["why"])]
    assert not behind + silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    named = set(re.findall(r"`?(test_\w+)(?:\.py)?::(test_\w+)", page.read_text()))
    gone = [f"{file}::{name}" for file, name in sorted(named) if f"\ndef {name}(" not in _text(ROOT / "tests" / f"{file}.py")]
    assert not gone
    assert len(named) >= (40 if page.name == "faults.md" else 0)


def test_every_cell_of_the_table_of_what_works_names_a_test():
    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "compatibility.md").read_text(), re.M)
    cells = [(row.split("|")[0], cell) for row in rows for cell in row.split("|")[1:] if set(row) - set("-|: ")]
    bare = [(what, cell) for what, cell in cells if "::" not in cell and cell.strip() not in ("diffusers", "ComfyUI", "transformers")]
    assert len(cells) > 30
    assert not bare
    slow = {"test_nodes_real"}  # real ComfyUI, or named slow: those have a star
    for file, name, star in re.findall(r"(test_\w+)::(test_\w+)(\*?)", "".join(cell for _, cell in cells)):
        assert (file in slow) <= (star == "*"), f"{file}::{name} does not run in make test: give it a star"


def test_whole_scripts_can_be_parsed_and_call_what_is_there():
    """They need models that are not here. Their syntax, and the names that they take from tqai, can be checked."""
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scripts.md").read_text(), flags=re.S)
    assert len(scripts) == 4
    for script in scripts:
        tree = ast.parse(script)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tqai":
                assert hasattr(tqai, node.attr), node.attr
        for name, family in re.findall(r'tqai\.preset\("(\w+)"(?:, family="(\w+)")?\)', script):
            assert tqai.preset(name, family or None)


def _text(path):
    return path.read_text() if path.is_file() else ""
