"""Finds the numbers in pages, docstrings and help texts that neither a result nor a definition stands behind.

A number is right where the generator writes it (a table between marks, a sentence of ``figures.py``), in code, or where one of
:data:`ALLOWED` says what it is: a size, a setting, a version, a formula. What is left was measured by nobody who can be asked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import figures

ROOT = figures.ROOT
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / figures.CORE).rglob("*.py")), *sorted((ROOT / "nodes").glob("*.py"))]

N = r"[\d,]*\.?\d+"
JOINED = r"(?:, or|, and|,| to| or| and|-)\s"
WHOLE = rf"\d[\d,]*(?:{JOINED}\d[\d,]*)*"
RANGE = rf"{N}(?:{JOINED}{N})*"
COUNTED = (
    "steps?|calls|bits?|bit caches|tokens|bytes|blocks|heads|frames|seeds|labels|queries|keys|layers|windows|samples|evaluations|"
    "trials|clips|numbers|kinds|vectors|payload bits|million numbers|at a time|on average|exact"
)
QUALITIES = "Euler|Gaussian|double|single|joint|exact|key|payload|of the"
SETTINGS = (
    "shift|guidance|seeds?|other seeds|order|sinks?|recent|recent window|tau|labels|last sigma to|windows of|vectors of|prefill of|"
    "multiple of|up to|density|bits and half at|peak =|sigma below|channels"
)
COMPARED = "errors?|errs?|faster|slower|fast|less|more|smaller|larger|KL|NMSE"
# parts of a whole beside a word for what is compared: a measurement in words
PARTS = (
    r"\b(?:half|halves|thirds?|quarters?|fifths?|sixths?|eighths?|tenths?|twice|thrice|double|"
    rf"(?:two|three|four|five|six|seven|eight|ten) times)\b(?=[^.;:|]{{0,24}}\b(?:{COMPARED})\b)"
)
TIMES = r"(?<![\w.])\d+(?:\.\d+)?x\b"
# what a number in a docstring looks like when it was measured; the others are definitions
MEASURED = (
    rf"{figures.NUMBER}(?= ?(?:%|MB/s|dB|ms\b|MiB|times|to [\d.]+ (?:times|%)|e-4))|"
    rf"(?<![\w.,\d-])\d*\.\d+(?![\w.]*\w)|{TIMES}"
)
ALLOWED = [
    (r"\b\d{4}\.\d{5}\b", "a paper"),
    (r"^\d(?=\. )", "a list"),
    (
        rf"\b(?:WAN|ComfyUI|tqai|Python|python3|Adams-Bashforth|Nodes|vLLM|LMCache|CRC) (?:>= )?{RANGE}(?: and [\d.]+)*(?: 5B)?",
        "a name, a version",
    ),
    (rf"(?<![\w.]){WHOLE}[\s-](?:(?:{QUALITIES}) )?(?:\+ \d+ )?(?:{COUNTED})\b", "a size, a setting"),
    (rf"\b(?:{SETTINGS})\s+\(?{RANGE}\b(?! times| %)", "a setting"),
    (r"NMSE (?:x 1)?e-4|\.4 \+ \.9 sigma|1\.3 - \.9 importance|\.06 moves by \.01, 2\.0 by \.1", "a unit, a formula, an example"),
    (r"Diffusion 3 and 3\.5|transformers >= 4\.56|before 5\.0|Martens 1412\.1193|with --demo \.8", "a name, a version, a paper, a default"),
    (r"best eighth gets|half-way between|about 1\.3 MiB", "how a method is defined, the size of a buffer"),
    (r"fraction: 2\.5 computes|10 to 50 times as large", "an option's value, how a mini was made"),
    (r"5 % (?=quantile|\(of errors)|\(of errors:? 95 %\)", "which quantile"),
    (r"[bB]elow\s1(?:\.00)? |Above 1\.00 |ratios below 2 ", "where a ratio means a loss, a gain or a tie"),
]


def blank(text: str, pattern: str, flags: int = 0) -> str:
    """``text`` with what matches replaced by spaces: places stay."""
    return re.sub(pattern, lambda m: re.sub(r"\S", " ", m[0]), text, flags=flags)


def prose(text: str) -> str:
    """What is written by hand in a page."""
    text = blank(text, r"<!-- (\S+) -->.*?<!-- /\1 -->", re.S)
    return blank(blank(text, r"```.*?```|\]\([^)]*\)|<[^>\n]*>", re.S), r"`[^`\n]*`")


def spoken(text: str) -> str:
    """What users read of a source file: docstrings, help of options and of commands."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()
    out = bytearray(byte if byte == 10 else 32 for byte in data)
    for node in _strings(ast.parse(text)):
        first, last = starts[node.lineno - 1] + node.col_offset, starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)
        out[first:last] = data[first:last]
    return blank(out.decode(), r"``.*?``|`[^`\n]*`", re.S)


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr):
            given = [node.body[0].value]
        elif isinstance(node, ast.Call):
            given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg in ("help", "description", "tooltip"))]
        elif isinstance(node, ast.Assign):
            given = [node.value]
        else:
            continue
        yield from (
            g for g in given if isinstance(g, ast.Constant) and isinstance(g.value, str) and " " in g.value and "{font:" not in g.value
        )


def unsourced() -> list[str]:
    """``file:line: number in its context`` of every number without a source."""
    out = []
    for path in [*PAGES, *SOURCES]:
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        read = prose(text) if path.suffix == ".md" else spoken(text)
        known: set[int] = set()
        for sentence in figures.sentences():
            if sentence[0] == name and (found := figures.place(sentence, text)):
                known.update(*(range(*found.span(i + 1)) for i in range(len(sentence[2]))))
        for pattern, _ in ALLOWED:
            known.update(*(range(*m.span()) for m in re.finditer(pattern, read, re.M)))
        look = f"{figures.NUMBER}|{TIMES}" if path.suffix == ".md" else MEASURED
        for m in re.finditer(f"{look}|{PARTS}", read):
            if m.start() not in known:
                around = " ".join(text[max(m.start() - 50, 0) : m.end() + 40].split())
                out.append(f"{name}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]!r} in '{around}'")
    return out
