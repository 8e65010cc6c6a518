"""The command ``tqai``. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import run
from .calibrate.cli import add_arguments, add_tune
from .calibrate.sampler_cli import add_sampler_arguments
from .errors import TqaiError
from .report import dumps
from .text import comma_list, output_of

MINIS = ("flux", "sd3", "wan")
BENCHES = {
    "dit": "forecast-skipping", "levels": "block, attention, guidance, overhead", "methods": "every scorer x strategy x monitor",
    "attention": "sparse and dense kernels", "sampler": "the calibrated sampler", "codec": "vectors", "stream": "trajectories",
    "llm": "KV caches", "calibrate": "calibration and tuning (also --kinds lm)",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. A user's error is one line on stderr and exit status 2; any other error keeps its traceback."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except TqaiError as error:
        print(f"tqai: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntqai: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tqai", description="Attention compression for diffusion transformers, measured.")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, call: Any) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help, description=help)
        p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON, to FILE or stdout")
        p.set_defaults(run=call)
        return p

    p = command("demo", "run the trained minis with and without tqai and draw the results", _demo)
    p.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the page and the pictures")
    p.add_argument("--kinds", type=comma_list(str), help="minis to run, as in flux,wan; left out: all that are here")
    p.add_argument("--seed", type=int, default=0)
    command("methods", "list every scorer, strategy, monitor and codec with its options", _methods)
    p = command("calibrate", "measure a model once and write what improves it into a file tied to that model", _calibrate)
    p.add_argument("-m", "--model", help="a diffusers pipeline: its folder or name; without --sampler also a language model's folder")
    p.add_argument("--demo", metavar="MINI", help="flux, sd3, wan (without --sampler also lm) instead of a model")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    add_sampler_arguments(p)
    add_arguments(p)
    add_tune(command("tune", "search for the pipeline with the least error within a budget, and prove it", _tune))
    p = command("report", "one HTML page for a calibration or a study", _report)
    p.add_argument("file", type=Path, help="a file of tqai calibrate, a study of tqai tune, or its --json")
    p.add_argument("-o", "--out", type=Path, default=Path("out/report.html"), metavar="FILE", help="the page")
    p = command("bench", "measure tqai and what it is compared with (in a checkout of the project)", _bench)
    p.add_argument("what", choices=tuple(BENCHES), help="; ".join(f"{name}: {what}" for name, what in BENCHES.items()))
    peers = "codec, stream, llm: beside other codecs (default); dit: other step caches instead"
    p.add_argument("--peers", action=argparse.BooleanOptionalAction, help=peers)
    p.add_argument("--report", action="store_true", help="stream: ten pipelines on seven model shapes, bytes counted")
    p.add_argument("--methods", action="store_true", help="llm: scorers, strategies and monitors on the packed cache instead")
    plots = "as SVG; codec: NMSE against bits with the Shannon line; llm: KL against bits held; attention: speed against tokens"
    p.add_argument("--plot", type=Path, metavar="FILE", help=plots)
    p.add_argument("--kinds", type=comma_list(str), default=MINIS, help="minis to run, as in flux,wan")
    p.add_argument("--seeds", type=comma_list(int), default=(0, 1, 2), help="seeds, as in 0,1,2")
    run.arguments(command("run", "one prompt through a language model or a diffusers pipeline, and what tqai saved and changed", _run))
    return parser


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
    result = run.run(args)
    if args.json:
        _write(args.json, dumps(result))
    print("", *run.lines_of(result), sep="\n", file=output_of(args))
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
        _write(args.json, json.dumps(data, indent=1))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from .calibrate import cli, sampler_cli

    if (args.model is None) == (args.demo is None):
        raise TqaiError("give either -m MODEL or --demo MINI to calibrate")
    if args.sampler:
        return _finish(args.json, result := sampler_cli.run(args), sampler_cli.tables_of(result))
    result = cli.summary(cli.run(args))
    return _finish(args.json, result, cli.tables_of(result))


def _tune(args: argparse.Namespace) -> int:
    from .calibrate import cli, tune

    return _finish(args.json, result := cli.tune(args), tune.tables_of(result))


def _report(args: argparse.Namespace) -> int:
    from .calibrate.page import page

    _write(str(args.out), page(args.file))
    if args.json:
        _write(args.json, json.dumps({"page": str(args.out)}))
    if args.json != "-":
        print(f"page: {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    """Calls the ``bench`` of a module of ``benchmarks/bench`` with those of ``kinds, seeds, peers, tell`` that it takes."""
    instead = {"dit": ("dit_peers", args.peers), "stream": ("stream_report", args.report), "llm": ("llm_methods", args.methods)}
    name, asked = instead.get(args.what, ("", False))
    bench = _laboratory(name if asked else args.what)
    if args.plot and not hasattr(bench, "plot"):
        raise TqaiError(f"bench {args.what} draws no plot: leave --plot out, or take codec, llm or attention")
    tell = lambda text: print(f"... {text}", file=sys.stderr, flush=True)  # noqa: E731
    given = {"kinds": args.kinds, "seeds": args.seeds, "peers": args.peers is not False, "tell": tell}
    result = bench.bench(**{name: value for name, value in given.items() if name in inspect.signature(bench.bench).parameters})
    if args.plot:
        _write(str(args.plot), bench.plot(result))
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
    if target:
        _write(target, dumps(result))
    if target != "-":
        for title, head, rows in tables:
            _print_table(title, head, rows)
    return 0


def _write(target: str, text: str) -> None:
    if target == "-":
        print(text)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n")  # not in one step: it may be a pipe


def _print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        figures = i > 0 and all(row[i][:1].isdigit() for row in rows if row[i])
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


if __name__ == "__main__":
    sys.exit(main())
