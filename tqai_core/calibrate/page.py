"""``tqai report``: one page for a calibration or a study, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import TqaiError
from ..files import MOST_HEADER, read_json
from . import plots
from .cli import tune_tables
from .file import Calibration

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left;vertical-align:top}
.row{display:flex;flex-wrap:wrap;gap:14px}svg{max-width:100%}.won{color:#17632f}.lost{color:#8a3d00}pre{white-space:pre-wrap}"""


def page(path: Path) -> str:
    """HTML of a file of ``tqai calibrate``, a study of ``tqai tune`` (.db) or its ``--json``. ValueError for anything else."""
    if not path.is_file():
        raise TqaiError(f"{path} is not there: give a file of tqai calibrate or tqai tune")
    with path.open("rb") as file:
        head = file.read(16).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"SQLite format"):
        from .tune import load_study

        return _page(f"tqai tune: {path.name}", _study(load_study(path)))
    if head.lstrip().startswith(b"{"):
        from .tune import check_study

        found = read_json(path, what="study", again="give what tqai tune --json wrote", most=MOST_HEADER)
        if not isinstance(found, dict) or found.get("what") != "study":
            raise TqaiError(f"{path} is JSON, but no study: give what tqai tune --json wrote")
        return _page(f"tqai tune: {path.name}", _study(check_study(found, str(path))))
    return _page(f"tqai calibrate: {path.name}", _calibration(Calibration.load(path)))


def _calibration(made: Calibration) -> list[str]:
    h, t = made.header, made.tensors
    rows = [[key, json.dumps(h.get(key))] for key in ("class", "model", "seeds", "held_out", "steps", "samples", "codec", "versions")]
    parts = [_table(["what", "value"], rows), "<h2>Sensitivity</h2><p>What a unit of squared error of keys or values costs the output.</p>"]
    sigmas = t["sigmas"].tolist()
    for band, sigma in enumerate(sigmas):
        parts.append(_maps(t["fisher"][..., band], f"{{}}, sigma {sigma:.2f}"))
    verdict = h["verdicts"]["bits"]
    losing = "" if verdict["kept"] == "fisher" else ", so that the file has uniform bits"
    seeds, ours, plain = ", ".join(map(str, verdict["seeds"])), verdict["fisher"], verdict["uniform"]
    parts.append(
        f"<h2>Bits</h2><p>{verdict['average']:g} on average, {html.escape(verdict['how'])}. Loss on seeds {seeds}: {ours['loss']:.3g} "
        f"({ours['bytes']:,} bytes), uniform {plain['loss']:.3g} ({plain['bytes']:,} bytes): "
        f"{_mark(verdict['kept'], 'fisher')} kept{losing}.</p>"
    )
    for band, sigma in enumerate(sigmas):
        parts.append(_maps(t["bits"][..., band].float(), f"bits of {{}}, sigma {sigma:.2f}", log=False))
    rows = [
        [name, str(i), f"{v['klt']:.2e}", f"{v['hadamard']:.2e}", _mark(v["kept"], "klt")]
        for name, heads in h["verdicts"]["bases"].items()
        for i, v in enumerate(heads)
    ]
    parts.append(f"<h2>Bases</h2><p>NMSE at {h['basis_bits']:d} bits on seed {h['held_out']:d}, which nothing was fitted on.</p>")
    parts.append(_table(["stream", "head", "KLT", "rotation", "kept"], rows, raw=(4,)))
    return parts


def _maps(table: Tensor, title: str, log: bool = True) -> str:
    """Keys and values side by side; ``table [layers, heads, 2]``."""
    maps = [plots.heat_map(table[..., i].tolist(), title.format(kind), log) for i, kind in enumerate(("keys", "values"))]
    return f"<div class=row>{''.join(maps)}</div>"


def _study(found: dict[str, Any]) -> list[str]:
    parts = [
        _table(["what", "value"], [[key, json.dumps(value)] for key, value in found["settings"].items()]),
        f"<h2>Error against {html.escape(str(found['budget']['what']))}</h2>",
        plots.pareto(found) if found["trials"] else "<p>no trial is finished yet</p>",
    ]
    parts += [f"<h2>{html.escape(title)}</h2>" + _table(head, rows) for title, head, rows in tune_tables(found)]
    if "config" in found:
        parts.append(f"<h2>Config</h2><pre>{html.escape(json.dumps(found['config'], indent=1))}</pre>")
    return parts


def _mark(kept: str, winner: str) -> str:
    return f'<b class="{"won" if kept == winner else "lost"}">{html.escape(kept)}</b>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], raw: Sequence[int] = ()) -> str:
    cells = lambda row: "".join(f"<td>{c if i in raw else html.escape(c)}</td>" for i, c in enumerate(row))  # noqa: E731
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _page(title: str, parts: Sequence[str]) -> str:
    title = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}\n"
