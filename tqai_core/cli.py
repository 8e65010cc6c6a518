"""The command ``tqai``. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import run, tryout
from .arguments import Parser, comma_list, json_target, out_file, out_folder, seed, words_of, write_out
from .calibrate.cli import add_arguments, add_tune
from .calibrate.sampler_cli import add_sampler_arguments
from .errors import TqaiError
from .text import output_of
from .version import VERSION

MINIS = ("flux", "sd3", "wan")
SHELLS = "Print it into a file that your shell reads, as in: tqai completion bash > ~/.local/share/bash-completion/completions/tqai"
BENCHES = {
    "dit": "forecast-skipping", "levels": "block, attention, guidance, overhead", "methods": "every scorer x strategy x monitor",
    "attention": "sparse and dense kernels", "sampler": "the calibrated sampler", "codec": "vectors", "stream": "trajectories",
    "llm": "KV caches", "llm_speed": "their time in a model of SmolLM2's shape",
    "dit_kv": "caches of references in diffusion transformers", "rolling": "histories of autoregressive video",
    "calibrate": "calibration and tuning (also --kinds lm)",
    "default": "the preset of a class that nobody tuned (also --kinds z_image)",
    "pipelines": "which pipelines of diffusers are taken", "few": "eight steps and fewer, on photographs and clips",
    "vllm": "prefixes that vLLM finds packed (needs .venv-vllm: make test-vllm)",
}  # fmt: skip
OTHERS = ("lm", "z_image", "photo", "photo_8", "photo_4", "wan_4", "wan_sizes")  # minis of single benches


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. A user's error is one line on stderr and exit status 2; any other error keeps its traceback."""
    try:
        try:
            return _main(words_of(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:  # it is where the caller closed it
                sys.stdout.flush()
    except (TqaiError, argparse.ArgumentTypeError) as error:
        print(f"tqai: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # else the interpreter says at its end that it cannot flush
        return 141
    except KeyboardInterrupt:
        print("\ntqai: stopped", file=sys.stderr)
        return 130


def _main(words: list[str]) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        cure = "a file for the figures is given as --json=FILE" if "--json=-" in words else f"see {parser.prog} {args.command or ''} --help"
        raise TqaiError(f"unknown: {' '.join(unknown)}; {cure}")
    if args.command is None:
        parser.print_help()
        return 0
    if not args.verbose:
        _quiet()
    _check_places(args)
    return int(args.run(args) or 0)


def _quiet() -> None:
    """Libraries say errors alone, unless --verbose or the variable of each says otherwise. Before they are imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", module=r"(transformers|diffusers|huggingface_hub|accelerate|peft|torchao|torch\.)")
    warnings.filterwarnings("default", message="tqai: ")


def _check_places(args: argparse.Namespace) -> None:
    """TqaiError where two files of a command are the same one, which the second would overwrite."""
    seen: dict[Path, str] = {}
    for name in ("file", "study", "json", "plot", "out", "output", "family"):
        given = getattr(args, name, None)
        if given in (None, "-") or ((path := Path(given).resolve()).exists() and not path.is_file()):  # a device takes both
            continue
        if path in seen:
            raise TqaiError(f"{given} is asked for twice, as {seen[path]} and as {name}: give two names")
        seen[path] = name


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tqai", description="Attention compression for diffusion transformers, measured.")
    parser.add_argument("--version", action="version", version=f"tqai-core {VERSION}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, call: Any) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help, description=help)
        to = "write the figures as JSON: --json to stdout, --json=FILE to a file (also --json FILE.json)"
        p.add_argument("--json", type=json_target, metavar="[=FILE]", help=to)
        p.add_argument("-v", "--verbose", action="store_true", help="show what the libraries say too")
        p.set_defaults(run=call, parser=p)
        return p

    shell = sub.add_parser("completion", help="print what makes a shell complete the words of tqai", description=SHELLS)
    shell.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    shell.set_defaults(run=_completion, parser=shell, verbose=False)
    p = command("demo", "run the trained minis with and without tqai and draw the results", _demo)
    p.add_argument("--out", type=out_folder, default="out/demo", help="folder of the page and the pictures")
    p.add_argument("--kinds", type=comma_list(str), help="minis to run, as in flux,wan; left out: all that are here")
    p.add_argument("--seed", type=seed, default=0)
    command("methods", "list every scorer, strategy, monitor and codec with its options", _methods)
    p = command("calibrate", "measure a model once and write what improves it into a file tied to that model", _calibrate)
    p.add_argument("-m", "--model", help="a diffusers pipeline: its folder or name; without --sampler also a language model's folder")
    p.add_argument("--demo", choices=(*MINIS, "lm"), help="a mini instead of a model; lm without --sampler alone")
    p.add_argument("-o", "--output", type=out_file, required=True, metavar="FILE", help="the file to write")
    add_sampler_arguments(p)
    add_arguments(p)
    add_tune(command("tune", "search for the pipeline with the least error within a budget, and prove it", _tune))
    p = command("report", "one HTML page for a calibration or a study", _report)
    p.add_argument("file", type=Path, help="a file of tqai calibrate, a study of tqai tune, or its --json")
    p.add_argument("-o", "--out", type=out_file, default="out/report.html", metavar="FILE", help="the page")
    p = command("bench", "measure tqai and what it is compared with (in a checkout of the project)", _bench)
    p.add_argument("what", choices=tuple(BENCHES), help="; ".join(f"{name}: {what}" for name, what in BENCHES.items()))
    peers = "codec, stream, llm: beside other codecs (default); dit: other step caches instead"
    p.add_argument("--peers", action=argparse.BooleanOptionalAction, help=peers)
    p.add_argument("--report", action="store_const", const=True, help="stream: ten pipelines on seven model shapes, bytes counted")
    p.add_argument("--methods", action="store_const", const=True, help="llm: scorers, strategies and monitors on the packed cache instead")
    real = "llm: caches of a real language model instead; FOLDER: default out/real-lm, which `make real-lm` makes"
    p.add_argument("--real", nargs="?", const="out/real-lm", metavar="FOLDER", help=real)
    plots = "as SVG; codec: NMSE against bits with the Shannon line; llm: KL against bits held; attention: speed against tokens"
    p.add_argument("--plot", type=out_file, metavar="FILE", help=plots)
    p.add_argument("--kinds", type=comma_list(str, (*MINIS, *OTHERS)), help="minis to run, as in flux,wan; left out: all of the bench")
    p.add_argument("--seeds", type=comma_list(seed), help="seeds, as in 0,1,2, which is the default")
    p.add_argument("--only", metavar="ROWS", help="few: the rows that begin so, as in 'photo_8 6'; they replace those of --json=FILE")
    tryout.arguments(command("try", "does it help on my model? the exact run, a few settings, one page, one verdict", _try))
    run.arguments(command("run", "one prompt through a language model or a diffusers pipeline, and what tqai saved and changed", _run))
    return parser


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise TqaiError("completion needs shtab: pip install shtab, or pip install 'tqai-core[completion]'") from None
    print(shtab.complete(_parser(), args.shell))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo
    from .minis import names

    result = demo.run(args.out, args.kinds, args.seed)
    _finish(args.json, result, demo.tables_of(result))
    if args.json != "-":
        print(f"\npictures and charts: {args.out / 'index.html'}")
        if args.kinds is None and (absent := sorted({*names.KINDS} - {*names.present()})):
            print(f"in a checkout of the project also: {', '.join(absent)}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from .report import dumps

    result = run.run(args)
    if args.json:
        write_out(args.json, dumps(result))
    print("", *run.lines_of(result), sep="\n", file=output_of(args))
    return 0


def _try(args: argparse.Namespace) -> int:
    result = tryout.run(args)
    _finish(args.json, {key: value for key, value in result.items() if key != "table"}, tryout.tables_of(result))
    print(*tryout.lines_of(result), sep="\n", file=output_of(args))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from .registry import REGISTRY

    data: dict[str, dict[str, dict[str, Any]]] = {}
    for role, methods in REGISTRY.items():
        rows, data[role] = [], {}
        for name, cls in sorted(methods.items()):
            options = {key: {"default": o["default"], "help": o["help"]} for key, o in cls.options().items()}
            data[role][name] = {"summary": cls.summary(), "paper": cls.paper, "options": options}
            rows.append([name, cls.summary(), "\n".join(f"{key}={o['default']}: {o['help']}" for key, o in options.items())])
        if not args.json:
            _print_table(role, ["name", "what it does", "options"], rows)
    if args.json:
        write_out(args.json, json.dumps(data, indent=1))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from .calibrate import cli, sampler_cli

    if (args.model is None) == (args.demo is None):
        raise TqaiError("give either -m MODEL or --demo MINI to calibrate")
    which: Any = sampler_cli if args.sampler else cli
    which.check(args)
    found = which.run(args)
    return _finish(args.json, found, which.tables_of(found))


def _tune(args: argparse.Namespace) -> int:
    from .calibrate import cli, family, tune

    result = cli.tune(args)
    return _finish(args.json, result, (family if args.family else tune).tables_of(result))


def _report(args: argparse.Namespace) -> int:
    from .calibrate.page import page

    write_out(args.out, page(args.file))
    if args.json:
        write_out(args.json, json.dumps({"page": str(args.out)}))
    if args.json != "-":
        print(f"page: {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    """Calls the ``bench`` of a module of ``benchmarks/bench`` with those of ``kinds, seeds, peers, tell`` that it takes."""
    instead = {"dit": ("dit_peers", "peers"), "stream": ("stream_report", "report"), "llm": ("llm_methods", "methods")}
    name, switch = ("llm_real", "real") if args.what == "llm" and args.real else instead.get(args.what, (args.what, ""))
    asked = bool(switch and getattr(args, switch))
    bench = _laboratory(name if asked else args.what)
    takes = inspect.signature(bench.bench).parameters
    given = {
        name: value
        for name in ("kinds", "seeds", "peers", "report", "methods", "real", "plot", "only")
        if (value := getattr(args, name)) is not None
    }
    used = {*takes, switch, *(["plot"] if hasattr(bench, "plot") else [])}
    if ignored := [f"--{name}" for name in given if name not in used]:
        raise TqaiError(f"bench {args.what}{f' --{switch}' if asked else ''} takes no {', '.join(ignored)}: leave it out")
    minis = getattr(bench, "KINDS", MINIS)
    if "lm" in given.get("kinds", ()) and args.what != "calibrate":
        raise TqaiError(f"bench {args.what} --kinds lm: the language model is in bench calibrate alone: give some of {', '.join(minis)}")
    if foreign := [kind for kind in given.get("kinds", ()) if kind in OTHERS[1:] and kind not in minis]:
        raise TqaiError(f"bench {args.what} --kinds {foreign[0]}: this bench has only {', '.join(minis)}")
    tell = lambda text: print(f"... {text}", file=sys.stderr, flush=True)  # noqa: E731
    given = {"kinds": minis, "seeds": (0, 1, 2), "peers": True, "tell": tell, "into": args.json} | given
    result = bench.bench(**{name: value for name, value in given.items() if name in takes})
    if args.plot:
        write_out(args.plot, bench.plot(result))
    _finish(args.json, result, bench.tables_of(result))
    return 0 if all(v["ok"] for v in result.get("verdicts", [])) else 1


def _laboratory(name: str) -> Any:
    """A module of ``benchmarks/bench``: the laboratory is part of a checkout, not of what pip installs."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "bench").is_dir():
        raise TqaiError(
            "tqai bench works in a checkout of the project, this is an installed package: clone the repository and run it there"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(f"bench.{name}")


def _finish(target: str | None, result: Any, tables: Iterable[tuple[str, list[str], list[list[str]]]]) -> int:
    """The figures as JSON into ``target`` if there is one, and as tables unless it is stdout."""
    from .report import dumps

    if target:
        write_out(target, dumps(result))
    if target != "-":
        for title, head, rows in tables:
            _print_table(title, head, rows)
    return 0


def _print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    class Pipe(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process here
            raise BrokenPipeError

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        figures = i > 0 and all(row[i][:1].isdigit() for row in rows if row[i])
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Pipe()
    (console if console.is_terminal else Pipe(width=140)).print(table)


if __name__ == "__main__":
    sys.exit(main())
