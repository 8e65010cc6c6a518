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

WHAT = (
    "dit: forecast-skipping; levels: block, attention, guidance, overhead; methods: every scorer x strategy x monitor; "
    "attention: sparse and dense kernels; sampler: the calibrated sampler; codec: vectors; stream: trajectories; llm: KV caches; "
    "calibrate: calibration and tuning (also --kinds lm)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Bad input is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="tqai", description="Attention compression for diffusion transformers, measured.")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, call: Any) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help, description=help)
        p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON, to FILE or stdout")
        p.set_defaults(run=call)
        return p

    demo = command("demo", "run the three trained minis with and without tqai and draw what came out", _demo)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the page and the pictures")
    demo.add_argument("--kinds", type=comma_list(str), default=("flux", "sd3", "wan"), help="minis to run, as in flux,wan")
    demo.add_argument("--seed", type=int, default=0)
    command("methods", "list every scorer, strategy, monitor and codec with its options", _methods)
    calibrate = command("calibrate", "measure a model once; what helps is kept in a file tied to it", _calibrate)
    calibrate.add_argument(
        "-m", "--model", help="a diffusers pipeline: its folder or name; without --sampler also a language model's folder"
    )
    calibrate.add_argument("--demo", metavar="MINI", help="flux, sd3, wan (without --sampler also lm) instead of a model")
    calibrate.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    add_sampler_arguments(calibrate)
    add_arguments(calibrate)
    add_tune(command("tune", "search for the pipeline with the least error within a budget, and prove it", _tune))
    report = command("report", "one HTML page for a calibration or a study", _report)
    report.add_argument("file", type=Path, help="a file of tqai calibrate, a study of tqai tune, or its --json")
    report.add_argument("-o", "--out", type=Path, default=Path("out/report.html"), metavar="FILE", help="the page")
    bench = command("bench", "measure, and print what is compared with", _bench)
    bench.add_argument(
        "what", choices=("dit", "levels", "methods", "attention", "sampler", "codec", "stream", "llm", "calibrate"), help=WHAT
    )
    peers = "codec, stream, llm: beside other codecs (default); dit: other step caches instead"
    bench.add_argument("--peers", action=argparse.BooleanOptionalAction, help=peers)
    bench.add_argument("--report", action="store_true", help="stream: ten pipelines on seven model shapes, bytes counted")
    bench.add_argument("--methods", action="store_true", help="llm: scorers, strategies and monitors on the packed cache instead")
    plots = "as SVG; codec: NMSE against bits with the Shannon line; llm: KL against bits held; attention: speed against tokens"
    bench.add_argument("--plot", type=Path, metavar="FILE", help=plots)
    bench.add_argument("--kinds", type=comma_list(str), default=("flux", "sd3", "wan"), help="minis to run, as in flux,wan")
    bench.add_argument("--seeds", type=comma_list(int), default=(0, 1, 2), help="seeds, as in 0,1,2")

    run.arguments(command("run", "one prompt through a language model or a diffusers pipeline, and what tqai saved and changed", _run))

    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except ValueError as error:
        print(f"tqai: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntqai: stopped", file=sys.stderr)
        return 130


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    result = demo.run(args.out, args.kinds, args.seed)
    _finish(args.json, result, demo.tables_of(result))
    if args.json != "-":
        print(f"\npictures and charts: {args.out / 'index.html'}")
    return 0


def _run(args: argparse.Namespace) -> int:
    result = run.run(args)
    if args.json:
        _write(args.json, dumps(result))
    print("", *run.lines_of(result), sep="\n", file=output_of(args))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from .registry import REGISTRY

    data: dict[str, dict[str, dict[str, Any]]] = {
        role: {
            name: {
                "summary": cls.summary(),
                "paper": cls.paper,
                "options": {k: {"default": o["default"], "help": o["help"]} for k, o in cls.options().items()},
            }
            for name, cls in sorted(methods.items())
        }
        for role, methods in REGISTRY.items()
    }
    if args.json:
        _write(args.json, json.dumps(data, indent=1))
        return 0
    for role, methods in data.items():
        rows = []
        for name, m in methods.items():
            options = "\n".join(f"{k}={o['default']}: {o['help']}" for k, o in m["options"].items())
            rows.append([name, m["summary"], options])
        _print_table(role, ["name", "what it does", "options"], rows)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from .calibrate import cli, sampler_cli

    if (args.model is None) == (args.demo is None):
        raise TqaiError("give either -m MODEL or --demo MINI to calibrate")
    if args.sampler:
        result = sampler_cli.run(args)
        _finish(args.json, result, sampler_cli.tables_of(result))
        return 0
    found = cli.summary(cli.run(args))
    _finish(args.json, found, cli.tables_of(found))
    return 0


def _tune(args: argparse.Namespace) -> int:
    from .calibrate import cli

    found = cli.tune(args)
    _finish(args.json, found, cli.tune_tables(found))
    return 0


def _report(args: argparse.Namespace) -> int:
    from .calibrate.page import page

    _write(str(args.out), page(args.file))
    if args.json:
        _write(args.json, json.dumps({"page": str(args.out)}))
    if args.json != "-":
        print(f"page: {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    """A bench takes of ``kinds, seeds, peers, tell`` what it has a use for, and is as found in ``bench/``."""
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


def _finish(target: str | None, result: Any, tables: Iterable[tuple[str, list[str], list[list[str]]]]) -> None:
    if target:
        _write(target, dumps(result))
    if target != "-":
        for title, head, rows in tables:
            _print_table(title, head, rows)


def _write(target: str, text: str) -> None:
    if target == "-":
        print(text)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n")


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
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
