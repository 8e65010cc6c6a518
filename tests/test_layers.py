"""Who may import whom, read from the source and checked in a fresh interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
FRAMEWORKS = {"diffusers", "transformers", "mlx", "mlx_lm", "vllm", "lmcache"}
CORE = sorted((ROOT / "tqai_core").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_walk_sees_imports():
    assert "diffusers" in imports(ROOT / "tqai_core/hosts/diffusers/minis.py")


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_knows_no_host(path):
    allowed = FRAMEWORKS if path.is_relative_to(ROOT / "tqai_core/hosts") else set()
    if path.name in ("_none.py",):
        allowed = {"diffusers"}  # prints the version it ran with
    assert not imports(path) & ((COMFY | FRAMEWORKS) - allowed)


def test_nodes_never_import_a_module_called_nodes():
    for path in (ROOT / "nodes").rglob("*.py"):
        assert "nodes" not in imports(path), f"{path}: use comfy.*, comfy_api or folder_paths"


def test_node_mapping_is_a_literal_that_static_scanners_can_read():
    tree = ast.parse((ROOT / "nodes/__init__.py").read_text())
    literal = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "NODE_CLASS_MAPPINGS"]
    assert len(literal) == 1
    assert isinstance(literal[0].value, ast.Dict)


def test_import_is_lean_and_silent():
    code = "import sys, tqai_core; {}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = {}
    for use in ("tqai_core.__version__", "tqai_core.Config(), tqai_core.methods()"):
        run = subprocess.run([sys.executable, "-c", code.format(use)], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stderr == ""
        loaded[use] = set(ast.literal_eval(run.stdout))
    first, then = loaded.values()
    assert not first & {"torch", "numpy"}, "tqai --help would wait for it"
    assert "torch" in then
    assert not then & (COMFY | FRAMEWORKS | {"sklearn", "rich", "PIL", "matplotlib", "tqdm_"})


def test_the_door_loads_beside_comfyui_and_shadows_nothing(tmp_path):
    code = """
import importlib.util, os, sys, types
comfy = types.ModuleType("nodes"); sys.modules["nodes"] = comfy
sys.path.append(os.path.join(sys.argv[1], "tests", "fakes"))
import comfy_fake, pathlib
sys.modules.update(comfy_fake.modules("0.33.0", pathlib.Path.cwd()))
path = list(sys.path)
name = sys.argv[1].replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(sys.argv[1], "__init__.py"))
pack = importlib.util.module_from_spec(spec); sys.modules[name] = pack; spec.loader.exec_module(pack)
assert sys.path == path and sys.modules["nodes"] is comfy
import tqai_core
assert not [m for m in sys.modules if m.startswith(name + ".tqai_core")], "two copies of the core"
print(isinstance(pack.NODE_CLASS_MAPPINGS, dict), len(tqai_core.methods()["codec"]) > 0)
"""
    run = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True True"


def test_one_new_file_shows_up_everywhere(tmp_path):
    import shutil

    shutil.copytree(ROOT / "tqai_core", tmp_path / "tqai_core", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    snr = (ROOT / "tqai_core/scorers/snr.py").read_text()
    (tmp_path / "tqai_core/scorers/zeta.py").write_text(snr.replace("class Snr", "class Zeta").replace('name="snr"', 'name="zeta"'))
    code = "import tqai_core as t; print(t.methods()['scorer'], t.Config(scorer='zeta:schedule=cosine').scorer)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'zeta'" in run.stdout
    assert "zeta:schedule=cosine" in run.stdout
    run = subprocess.run([sys.executable, "-m", "tqai_core.cli", "methods"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "zeta" in run.stdout


TOYS = {"family": "families/toy.py", "token_scorer": "scorers/toytokens.py", "forecaster": "strategies/toyhalf.py"}


def test_a_family_a_token_scorer_and_a_forecaster_are_one_file_each(tmp_path):
    """Found by diffusers, the ComfyUI host, caches, presets, the command and the docs, and they act there."""
    import shutil

    shutil.copytree(ROOT / "tqai_core", tmp_path / "tqai_core", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for toy, place in TOYS.items():
        shutil.copy(ROOT / f"tests/toys/{toy}.py", tmp_path / "tqai_core" / place)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    check = [sys.executable, str(ROOT / "tests/toys/check.py"), str(ROOT / "tests")]
    run = subprocess.run(check, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "all found", run.stderr
    listed = subprocess.run([sys.executable, "-m", "tqai_core.cli", "methods"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "toytokens" in listed.stdout
    assert "toyhalf" in listed.stdout


def test_the_registry_finds_its_fields_and_the_manager_nothing_to_install():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    comfy = data["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= comfy.keys()
    assert "web" not in comfy, "beside WEB_DIRECTORY it would load each script twice"
    assert comfy["Icon"].rpartition("/main/")[2] == "docs/img/icon.png"
    assert (ROOT / "docs/img/icon.png").exists()
    assert data["project"]["urls"]["Repository"]
    # the Manager installs these over the user's own; what the nodes import comes with ComfyUI
    assert not (ROOT / "requirements.txt").exists()
    assert not (ROOT / "install.py").exists()
    with_comfyui = {"torch", "numpy", "PIL", "safetensors", "einops"} | COMFY
    ours = {name for path in (ROOT / "nodes").rglob("*.py") for name in imports(path)} - set(sys.stdlib_module_names)
    assert ours <= with_comfyui | {"tqai_core"}
