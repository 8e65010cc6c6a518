"""The command's arguments: every mistake is one line with the cure and exit status 2, before anything is loaded or written."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tqai_core.arguments import out_file, words_of
from tqai_core.cli import main
from tqai_core.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
LOADERS = (
    "tqai_core.hosts.calibration_targets.demo", "tqai_core.hosts.calibration_targets.folder", "tqai_core.hosts.diffusers.minis.pipeline",
    "tqai_core.hosts.diffusers.load.pipeline", "tqai_core.hosts.transformers.run.load", "tqai_core.hosts.diffusers.run.load",
    "tqai_core.demo.Mini", "tqai_core.calibrate.page.page",
    *(f"bench.{name}.bench" for name in ("codec", "dit", "dit_kv", "dit_peers", "stream", "attention", "sampler", "calibrate", "rolling")),
    "bench.llm.bench", "bench.llm_methods.bench",
)  # fmt: skip
CALIBRATE = ("calibrate", "--demo", "flux", "-o", "c.safetensors")
SAMPLER = ("calibrate", "--sampler", "--demo", "flux", "-o", "s.json")
RUN = ("run", "hi", "--demo")
TRY = ("try", "-m", "flux")
HELPS = (("--help",), *((name, "--help") for name in ("run", "try", "calibrate", "tune", "bench")))
# places that cannot be written, root or not: a folder where a file is asked for, below a file, /proc
PLACES = ("folder", "file/x", "/proc/tqai/x")


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """A working folder with ``folder`` and ``file``; whatever loads a model or measures fails the test."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("one prompt")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "five.json").write_text('{"level": "kv", "strategy": "delta", "strategy_kwargs": 5}')
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with sqlite3.connect(tmp_path / "foreign.db") as database:
        database.execute("CREATE TABLE notes (text)")
    monkeypatch.chdir(tmp_path)
    originals = {}
    for name in LOADERS:  # all of them before one is replaced: some import others
        module, _, function = name.rpartition(".")
        originals[name] = getattr(importlib.import_module(module), function)
    for name, original in originals.items():

        def loaded(*args, name=name, **kw):
            pytest.fail(f"{name} was called")

        loaded.__signature__ = inspect.signature(original)  # the bench command reads it
        monkeypatch.setattr(name, loaded)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    yield tmp_path
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, "something was written"


MISTAKES = [
    # places of output
    *((command, f"{option}{between}{place}", "cannot be written" if "x" in place else "is a folder")
      for command in (("methods",), ("demo",), RUN, TRY, ("report", "file"), CALIBRATE, ("tune", "--demo", "flux"), ("bench", "codec"))
      for option, between in (("--json", "="),) for place in PLACES),
    *((("calibrate", "--demo", "flux", *extra), f"-o={place}", "cannot be written" if "x" in place else "is a folder")
      for extra in ((), ("--sampler",)) for place in PLACES),
    *((("tune", "--demo", "flux"), f"{option}={place}", "cannot be written" if "x" in place else "is a folder")
      for option in ("-o", "--plot", "--study", "--family") for place in PLACES),
    *((("report", "file"), f"-o={place}", "cannot be written" if "x" in place else "is a folder") for place in PLACES),
    *((("bench", "codec"), f"--plot={place}", "cannot be written" if "x" in place else "is a folder") for place in PLACES),
    *((("demo",), f"--out={place}", "file" if place == "file" else "cannot be written") for place in ("file", "file/x", "/proc/tqai")),
    (("methods",), "--json=", "the name is empty"),
    # run
    (RUN, "--seed 99999999999999999999", "give a whole number, 0 to 18446744073709551615"),
    (RUN, "--seed -1", "give a whole number"),
    (RUN, "--seed x", "give a whole number"),
    (RUN, "--device meta", "--device meta"),
    (RUN, "--device nope", "--device nope"),
    (RUN, "--max-tokens 0", "--max-tokens 0: give a whole number, 1 or more"),
    (RUN, "--temperature nan", "--temperature nan: give 0 (greedy) or a temperature"),
    (RUN, "--out x", "--out asked, but this is a language model"),
    (RUN, "--guidance nan", "--guidance nan"),
    (RUN, "--pipeline deep.json", "deep.json"),
    (RUN, "--pipeline five.json", "strategy_kwargs"),
    (RUN, "--pipeline nofile", "nofile"),
    (RUN, "--pipeline folder", "folder"),
    # calibrate
    (CALIBRATE, "--bits 99", "--bits 99: give a whole number, 1 to 8"),
    (CALIBRATE, "--bits 0", "--bits 0: give"),
    (CALIBRATE, "--average 1000000", "--average 1000000: give a whole number, 2 to 6"),
    (CALIBRATE, "--batch 0", "--batch 0: give"),
    (CALIBRATE, "--batch -4", "--batch -4: give"),
    (CALIBRATE, "--probes 0", "--probes 0: give"),
    (CALIBRATE, "--bands 25", "--bands 25: give 1 to 24"),
    (CALIBRATE, "--steps 0", "--steps 0: give"),
    (CALIBRATE, "--seeds ", "is empty: give one or more"),
    (CALIBRATE, "--seeds 1,1", "each once"),
    (CALIBRATE, "--seeds 104", "are kept for the verdicts: give others"),
    (CALIBRATE, "--seeds 1,99999999999999999999", "give a whole number"),
    (CALIBRATE, "--prompts nofile", "nofile: No such file or directory: give a text file"),
    (CALIBRATE, "--prompts folder", "Is a directory"),
    (CALIBRATE, "--prompts empty", "empty is empty"),
    (CALIBRATE, "--prompts latin", "no UTF-8 text"),
    (CALIBRATE, "--prompts file", "--prompts asked, but its data are fixed"),
    (CALIBRATE, "--part foo", "invalid choice: 'foo'"),
    (CALIBRATE, "--shift 2", "--shift asked, but it is an option of --sampler"),
    (CALIBRATE, "-m folder", "either -m MODEL or --demo MINI"),
    (("calibrate", "--demo", "lm", "-o", "c"), "--steps 8", "--steps asked, but this is a language model"),
    (SAMPLER, "--shift nan", "--shift nan: give a number"),
    (SAMPLER, "--shift inf", "--shift inf: give"),
    (SAMPLER, "--guidance nan", "--guidance nan: give a number"),
    (SAMPLER, "--reach 1,nan", "give a number"),
    (SAMPLER, "--size foo", "--size foo: give WIDTHxHEIGHT"),
    (SAMPLER, "--size 0x64", "--size 0x64: give WIDTHxHEIGHT"),
    (SAMPLER, "--size 64x64", "--size asked, but flux is a mini"),
    (SAMPLER, "--teacher 10", "too coarse for 12 steps: give"),
    (SAMPLER, "--steps 2", "a calibrated sampler takes 3 or more"),
    (SAMPLER, "--bits 4,4", "--bits 4,4: give a whole number"),
    (SAMPLER, "--bits 3", "--bits asked, but it is no option of --sampler"),
    (("calibrate", "--sampler", "-m", "folder", "-o", "s.json"), "--device nope", "--device nope"),
    (("calibrate", "--sampler", "-m", "folder", "-o", "s.json"), "--device meta", "--device meta"),
    (("calibrate", "--sampler", "-o", "s.json"), "--demo lm", "give flux, sd3 or wan"),
    # tune
    (("tune", "--demo", "flux"), "--levels ", "is empty: give one or more"),
    (("tune", "--demo", "flux"), "--levels model,foo", "foo unknown: give some of model, block, attention"),
    (("tune", "--demo", "flux"), "--batch 0", "--batch 0: give"),
    (("tune", "--demo", "flux"), "--trials 0", "--trials 0: give"),
    (("tune", "--demo", "flux"), "--budget calls=nan", "budget 'calls=nan': give calls="),
    (("tune", "--demo", "flux"), "--study foreign.db", "is no study of tqai tune"),
    (("tune", "--demo", "flux"), "--study file", "is no study of tqai tune"),
    (("tune", "--demo", "flux"), "--prompts file", "--prompts asked"),
    (("tune", "--demo", "flux"), "--family my.py", "--family my.py: give a name that ends in .json"),
    (("tune", "--demo", "flux"), "--family my.json --steps 30", "--steps asked, but --family tries tolerances alone"),
    (("tune", "--demo", "flux"), "--family my.json --study s.db", "--study asked, but --family"),
    (("tune", "--demo", "flux"), "--family my.json -o my.json", "is asked for twice, as out and as family"),
    (("tune",), "-m folder", "no folder of a diffusers pipeline"),
    # try
    (("try", "-m", "flux"), "--out file", "--out file cannot be written (Not a directory): give a folder"),
    (("try", "-m", "flux"), "--kl .1", "--kl asked, but this is a diffusers pipeline"),
    (("try", "-m", "lm"), "--psnr 30", "--psnr asked, but this is a language model"),
    (("try", "-m", "flux"), "--device nope", "--device nope"),
    (("try", "-m", "flux"), "--minutes inf", "--minutes inf: give a number"),
    (("try", "-m", "lm"), "--max-tokens 1", "--max-tokens 1: give a whole number, 2 or more"),
    (("try", "-m", "folder"), "", "has neither config.json"),
    (("try", "-m", "file"), "", "is a file: give the folder"),
    (("try",), "", "-m/--model; see tqai try --help"),
    (("completion", "fish"), "", "invalid choice: 'fish'"),
    # demo and benches
    (("demo",), "--kinds ", "is empty: give one or more"),
    (("demo",), "--kinds sdxl", "unknown mini sdxl; known"),
    (("demo",), "--seed 99999999999999999999", "give a whole number"),
    (("bench", "dit"), "--seeds ", "is empty: give one or more"),
    (("bench", "dit"), "--seeds -1,2", "give a whole number"),
    (("bench", "sampler"), "--kinds foo", "foo unknown: give some of flux, sd3, wan, lm, z_image"),
    (("bench", "sampler"), "--kinds z_image", "this bench has only flux, sd3, wan"),
    (("bench", "sampler"), "--kinds lm", "bench calibrate alone"),
    *((("bench", name), "--kinds flux", f"bench {name} takes no --kinds") for name in ("codec", "stream", "attention", "llm")),
    (("bench", "codec"), "--seeds 1", "bench codec takes no --seeds"),
    (("bench", "sampler"), "--peers", "takes no --peers"),
    (("bench", "codec"), "--report", "takes no --report"),
    (("bench", "llm"), "--methods --no-peers", "bench llm --methods takes no --peers"),
    (("bench", "sampler"), "--plot x.svg", "takes no --plot"),
    (("report", "file"), "-o file", "is asked for twice, as file and as out"),
    (("tune", "--demo", "flux"), "--study t.json --plot t.json", "is asked for twice, as study and as plot"),
    (CALIBRATE, "--json=c.safetensors", "is asked for twice, as json and as output"),
    (("nonsense",), "", "invalid choice: 'nonsense'"),
    (("run", "hi"), "", "one of the arguments -m/--model --demo is required; see tqai run --help"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "says"), MISTAKES, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_mistake_is_one_line_before_any_work(nothing_runs, capsys, command, option, says):
    words = option.split(" ") if option else []  # "--kinds " is the option and an empty word
    if words and "=" in words[0] and words[0].startswith("-o="):
        words = ["-o", words[0][3:]]
    assert main([*command, *words]) == 2
    out, error = capsys.readouterr()
    assert says in error
    assert error.startswith("tqai: ")
    assert error.count("\n") == 1
    assert out == ""


def test_a_bare_json_takes_no_other_word(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("tqai_core.run.run", lambda args: seen.append((args.prompt, args.json)) or {"kind": "lm"})
    monkeypatch.setattr("tqai_core.run.lines_of", lambda result: [])
    assert main(["run", "--json", "a prompt", "--demo"]) == 0
    assert seen == [("a prompt", "-")]
    assert json.loads(capsys.readouterr().out) == {"kind": "lm"}


def test_words_that_begin_with_a_negative_number_belong_to_the_option_before():
    assert words_of(["--skip-layers", "-1,0", "-x", "-2"]) == ["--skip-layers=-1,0", "-x", "-2"]
    assert words_of(["bench", "dit", "--json", "out/dit.json", "--json", "-"]) == ["bench", "dit", "--json=out/dit.json", "--json=-"]
    assert words_of(["run", "--json", "--", "--json", "-1,0"]) == ["run", "--json=-", "--", "--json", "-1,0"]
    assert words_of(["--json=f", "-1"]) == ["--json=f", "-1"]


def test_a_negative_list_reaches_the_pipeline(capsys):
    argv = ("run", "def f(", "--demo", "--skip-layers", "-1,0", "--max-tokens", "3", "--json")
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["config"]["skip_layers"] == [-1, 0]


def test_a_pipeline_with_a_byte_order_mark_is_read(capsys, tmp_path):
    (tmp_path / "p.json").write_text('{"skip_layers": [0]}', encoding="utf-8-sig")
    assert main(["run", "def f(", "--demo", "--pipeline", str(tmp_path / "p.json"), "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["skip_layers"] == [0]


def test_files_that_can_be_written_are_taken(tmp_path):
    for name in ("new", "deep/er/new"):
        assert out_file(str(tmp_path / name)) == tmp_path / name
    (tmp_path / "old").write_text("before")
    assert out_file(str(tmp_path / "old")).read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"], "looking leaves nothing behind"
    assert out_file(os.devnull)


def test_a_study_of_ours_is_taken_again_and_a_foreign_one_stays_as_it_was(nothing_runs):
    before = (nothing_runs / "foreign.db").read_bytes()
    assert main(["tune", "--demo", "flux", "--study", "foreign.db"]) == 2
    assert (nothing_runs / "foreign.db").read_bytes() == before


# -- processes


def tqai(*argv, **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, "-m", "tqai_core", *argv], capture_output=True, text=True, env=env, check=False, **options)


def test_help_and_version_need_no_torch():
    for argv in (
        ("--version",),
        (),
        ("--help",),
        ("run", "--help"),
        ("try", "--help"),
        ("calibrate", "--help"),
        ("tune", "--help"),
        ("bench", "--help"),
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tqai(*argv)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout == f"tqai-core {VERSION}\n" if argv == ("--version",) else done.stdout.startswith("usage: tqai")
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3, argv
    code = "import sys; from tqai_core.cli import main; main([]); assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_libraries_are_quiet_unless_asked_and_what_tqai_warns_of_is_not():
    code = """import sys, warnings
from tqai_core.cli import main
main(['methods', *sys.argv[1:]])
import diffusers
from diffusers import FluxPipeline
warnings.warn_explicit('of a library', UserWarning, 'x.py', 1, module='transformers.modeling_utils')
warnings.warn_explicit('tqai: of ours', UserWarning, 'y.py', 1, module='diffusers.pipelines.flux')
"""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    said = lambda *argv: subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, check=True).stderr
    assert said() == "y.py:1: UserWarning: tqai: of ours\n"
    assert "of a library" in said("-v")


def test_a_shell_completes_every_command_and_option(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("demo", "try", "calibrate", "--minutes", "--max-tokens"):
            assert word in script or (shell == "tcsh" and word.startswith("--")), (shell, word)


def test_completion_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "tqai: completion needs shtab: pip install shtab, or pip install 'tqai-core[completion]'\n"


@pytest.mark.skipif(os.name != "posix", reason="closes a standard stream in the shell")
def test_a_closed_output_is_quiet():
    done = subprocess.run(["sh", "-c", f"exec '{sys.executable}' -m tqai_core methods >&-"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.stderr == ""


@pytest.mark.parametrize("argv", [("methods",), ("methods", "--json"), ("run", "def f(", "--demo", "--max-tokens", "40"), ("--help",)])
def test_a_closed_pipe_is_quiet(argv):
    """The reader is gone before the first word: no traceback, the status of a process that SIGPIPE ended."""
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    try:
        done = subprocess.run([sys.executable, "-m", "tqai_core", *argv], stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(writing)
    assert done.returncode == (0 if argv == ("--help",) else 141)  # argparse says nothing of it itself
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
