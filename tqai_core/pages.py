"""HTML pages with nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left;vertical-align:top}
.row{display:flex;flex-wrap:wrap;gap:14px}svg{max-width:100%}.won{color:#17632f}.lost{color:#8a3d00}pre{white-space:pre-wrap}"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], raw: Sequence[int] = ()) -> str:
    """Cells are text, those of the columns ``raw`` HTML."""
    cells = lambda row: "".join(f"<td>{c if i in raw else html.escape(c)}</td>" for i, c in enumerate(row))  # noqa: E731
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{body}</table>"


def sheet(title: str, parts: Sequence[str]) -> str:
    title = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}\n"
