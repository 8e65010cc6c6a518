"""What an installation is promised: one lowest Python, an sdist that can be tested, commands for every system, one address."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOWEST = "3.11"
WEIGHTS = [f"{name}.safetensors" for name in ("flux", "sd3", "wan", "lm")]
FOREIGN = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "build", "dist", "mutants", "results", "img", *WEIGHTS)


def test_every_place_names_the_same_lowest_python():
    assert PROJECT["project"]["requires-python"] == f">={LOWEST}"
    named = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named[0] == LOWEST
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + LOWEST.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == LOWEST
    makefile = (ROOT / "Makefile").read_text()
    assert f"python3 >= {LOWEST} and make" in makefile
    assert f"sys.version_info >= ({LOWEST.replace('.', ', ')})" in makefile
    assert f"Python {LOWEST} or newer" in (ROOT / "README.md").read_text()
    assert f"python3 >= {LOWEST}" in (ROOT / "CONTRIBUTING.md").read_text()
    old = [
        page.name
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile")
        if re.search(r"[Pp]ython[ >=]*3\.10\b", page.read_text())  # a figure may be 3.10 too
    ]
    assert not old or old == ["CHANGELOG.md"]


def test_the_sdist_has_all_that_its_tests_need(tmp_path):
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT, tmp_path / "tqai", ignore=FOREIGN)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "tqai", check=True, capture_output=True)
    (made,) = (tmp_path / "tqai" / "dist").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    tests = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tests/conftest.py", "tests/fakes/comfy_fake.py", "tests/toys/check.py", "tests/fakes/schemas.json"} <= tests
    assert tests <= there, tests - there
    assert {
        "Makefile",
        "constraints.txt",
        "README.md",
        "__init__.py",
        "nodes/patch.py",
        "benchmarks/bench/dit.py",
        "docs/steps.md",
    } <= there
    assert not [name for name in there if name.endswith(".pyc")]


def test_the_readme_installs_without_make_and_on_windows():
    install = (ROOT / "README.md").read_text().partition("## Install\n")[2].partition("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", install, re.S)[0]
    assert "make" not in commands
    assert "'" not in commands, "cmd.exe takes single quotes for letters"
    assert "export" not in commands
    assert "-m venv" in commands
    assert commands.index("constraints.txt torch") < commands.index("-e"), "torch first"
    for word in (r".venv\Scripts\activate", "python3-venv", "CUDA", "https://download.pytorch.org/whl/cpu"):
        assert word in install


def test_the_address_of_the_repository_stands_in_one_file():
    """The icon's address is a file of the same repository. Besides, only what benchmarks/readme.py writes into the README from there
    names it, so that one edit and that command move the project."""
    address = PROJECT["project"]["urls"]["Repository"]
    owner = address.removeprefix("https://github.com/")
    assert PROJECT["tool"]["comfy"]["Icon"].startswith(f"https://raw.githubusercontent.com/{owner}/")
    texts = [
        p
        for top in ("tqai_core", "nodes", "docs", "web", "benchmarks")
        for p in (ROOT / top).rglob("*")
        if p.suffix in (".py", ".md", ".js")
    ]
    written = lambda path: re.sub(r"<!-- (get\S*) -->.*?<!-- /\1 -->", "", path.read_text(), flags=re.S)
    wrong = [str(path) for path in (*texts, *ROOT.glob("*.md"), ROOT / "Makefile") if owner in written(path)]
    assert not wrong
    assert (ROOT / "README.md").read_text().count(f"git clone {address} ") == 2


def test_the_promised_python_can_import_it():
    """Whatever runs the tests is at least the promised one; a newer one must not hide what the promised one lacks."""
    assert sys.version_info >= tuple(map(int, LOWEST.split(".")))
    found = shutil.which(f"python{LOWEST}")
    works = (
        found and subprocess.run([found, "-c", "import sys; assert sys.version_info[:2] == (3, 11)"], capture_output=True).returncode == 0
    )
    if not works:
        pytest.skip(f"no python{LOWEST} here")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([found, "-m", "tqai_core", "--version"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
