"""The figures that stand in sentences, of pages and of docstrings: each sentence beside what its figures come from.

A sentence is ``(file, text, values)``: ``text`` is a part of the file with ``{}`` where a figure stands, long enough to be found
once, whatever its line breaks. ``benchmarks/readme.py`` writes the values there. Change the words here when you change them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("flux", "sd3", "wan")
NUMBER = r"(?<![\w.-])[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?!\w|\.\d)"
Sentence = tuple[str, str, list[str]]
CORE = "tqai_core"


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def short(value: float, digits: int = 2) -> str:
    """As docstrings write it: .74, 1.06."""
    return re.sub(r"^0\.", ".", f"{value:.{digits}f}")


def span(values: Iterable[float], form: Callable[[float], str] = short) -> list[str]:
    """The least and the largest."""
    found = list(values)
    return [form(min(found)), form(max(found))]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def e4(value: float) -> str:
    return f"{value * 1e4:.2f}"


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    (row,) = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


def euler(kind: str, method: str, figure: str = "nmse") -> float:
    return pick(load("dit")["tables"][kind]["euler"], method=method)[figure]


def euler_ratio(method: str, other: str, figure: str = "nmse") -> list[float]:
    return [euler(kind, method, figure) / euler(kind, other, figure) for kind in KINDS]


def worth(scorer: str) -> list[float]:
    """Error of a scorer as weight of the tolerance, over that without one, each mini."""
    tables = [load("methods")["tables"][kind]["worth"] for kind in KINDS]
    return [pick(rows, scorer=scorer)["nmse"] / rows[0]["nmse"] for rows in tables]


def cache(method: str, bits: str = "k.v.", figure: str = "against_plain") -> list[float]:
    """A figure of the methods alone at level kv (``method`` and ``bits`` are patterns): KL over a plain cache of equal bytes."""
    rows = load("llm_methods")["alone"]
    return [r[figure] for r in rows if re.fullmatch(method, r["method"]) and re.fullmatch(bits, r["bits"])]


def gaussian(name: str) -> tuple[list[float], list[float]]:
    """NMSE and bits held of a codec at 2, 3 and 4 bits, d = 128."""
    rows = [r for r in load("codec")["rate"] if r["codec"] == name and r["d"] == 128 and int(r["bits"]) in (2, 3, 4)]
    return [r["nmse"] for r in rows], [r["bits"] for r in rows]


def window(kind: str, method: str) -> float:
    return pick(load("levels")["tables"][kind]["window"], method=method)["nmse"]


def clips(method: str) -> list[float]:
    return pick(load("attention")["wan"], method=method)["nmse"]


def codecs() -> Iterator[Sentence]:
    speed = pick(load("codec")["speed"], codec="turbo", bits=4)["encode"]
    (turbo, bits), (trellis, _) = gaussian("turbo"), gaussian("trellis")
    nmse = lambda errors: [short(e, d) for e, d in zip(errors, (3, 4, 4), strict=True)]  # noqa: E731
    rates = [f"{b:.2f}" for b in bits]
    yield f"{CORE}/codecs/turbo.py", "Encodes at {} MB/s", [f"{speed:,.0f}"]
    yield f"{CORE}/codecs/turbo.py", "NMSE {} / {} / {} at {} / {} / {} bits", [*nmse(turbo), *rates]
    less = span((1 - b / a for a, b in zip(turbo, trellis, strict=True)), lambda v: f"{100 * v:.0f}")
    yield f"{CORE}/codecs/trellis.py", "{} to {} % less error at the same bytes", less
    yield f"{CORE}/codecs/trellis.py", "NMSE {} / {} / {} at {} / {} / {} bits", [*nmse(trellis), *rates]
    yield "docs/codec.md", "has {} to {} % less error at the same bytes", less


def presets() -> Iterator[Sentence]:
    parts = []
    for name in ("quality", "balanced", "fast"):
        parts += span((euler(kind, f"tqai {name}", "skipped") for kind in KINDS), lambda v: f"{100 * v:.0f}")
    skipped = "``quality`` ({} to {} % of the calls of 24 Euler steps skipped), ``balanced`` ({} to {} %), ``fast`` ({} to {} %)"
    yield f"{CORE}/config.py", skipped, parts


def monitors() -> Iterator[Sentence]:
    fixed, free = "fixed schedule, order 1, same calls", "tqai balanced, uncoded"
    pairs = [f"{short(1e4 * euler(kind, method))}" for kind in KINDS for method in (fixed, free)]
    yield f"{CORE}/monitors/fixed.py", "NMSE e-4: Flux {} to {}, SD3 {} to {}, WAN {} to {}", pairs
    yield f"{CORE}/monitors/fixed.py", "plain ones of equal bytes, {} to {} times the KL", span(cache("fixed"))
    yield f"{CORE}/monitors/lyapunov.py", "not a gain ({} to {} times the KL", span(cache("lyapunov"))
    yield f"{CORE}/monitors/stability.py", "it loses: {} to {} times the KL", span(cache("stability"))
    proofs = [load("calibrate")["tables"][kind]["tune"]["proof"] for kind in KINDS]
    tuned = [short(p["tuned"]["error"] / p["default"]["error"]) for p in proofs]
    yield f"{CORE}/monitors/schedule.py", "found on other seeds has {} (Flux), {} (SD3) and {} (WAN)", tuned


def scorers() -> Iterator[Sentence]:
    yield f"{CORE}/scorers/bsa.py", "it helps little if at all: {} to {} times the error", span(worth("bsa"))
    yield f"{CORE}/scorers/bsa.py", "gain next to nothing or lose: {} to {} times the KL", span(cache("(tiered.* by )?bsa"))
    near, ours = (cache(f"window by {what}", figure="kl")[0] for what in ("nearness", "bsa"))
    yield f"{CORE}/scorers/bsa.py", "have {} of the KL of the nearest blocks", [short(ours / near)]
    yield f"{CORE}/scorers/change.py", "seldom beats its absence: {} to {} times the error", span(worth("change"))
    yield f"{CORE}/scorers/change.py", "plain ones of equal bytes, {} to {} times the KL", span(cache("(tiered.* by )?change"))
    ranks = span(t["rank"]["fisher x error"] for t in load("calibrate")["tables"].values())
    yield f"{CORE}/scorers/fisher.py", "rank correlation {} to {} with true damage", ranks
    three = lambda name: [short(v) for v in worth(name)]  # noqa: E731
    yield f"{CORE}/scorers/palm.py", "it has {} (Flux), {} (SD3) and {} (WAN) times", three("palm")
    tiers, plain = cache("tiered.* by palm"), cache("palm")  # each over k2v2 and over k4v4
    yield f"{CORE}/scorers/palm.py", "it gains at 2 bits, {} (``tiered``) to {} of", [short(tiers[0]), short(plain[0])]
    yield f"{CORE}/scorers/palm.py", "at 4 bits nothing ({} alone, {} with ``tiered``)", [short(plain[1]), short(tiers[1])]
    yield f"{CORE}/scorers/sheaf.py", "it has {} to {} times the error", span(worth("sheaf"))
    yield f"{CORE}/scorers/sheaf.py", "it loses: {} to {} times the KL", span(cache("(tiered.* by )?sheaf"))
    yield f"{CORE}/scorers/snr.py", "it has {} (Flux), {} (SD3) and {} (WAN) times", three("snr")


def strategies() -> Iterator[Sentence]:
    reuse = [f"{v:.0f}" for v in euler_ratio("plain reuse, same calls", "fixed schedule, order 1, same calls")]
    yield f"{CORE}/strategies/delta.py", "it has {} (Flux), {} (SD3) and {} (WAN) times the error of ``delta2``", reuse
    for name in ("delta", "delta2"):
        yield f"{CORE}/strategies/{name}.py", "{} (2 bits) and {} (4 bits) of the KL", [short(v) for v in cache(name)]
    coded = span(euler_ratio("tqai balanced", "tqai balanced, uncoded"))
    held = max(euler(kind, "tqai balanced", "held") / euler(kind, "tqai balanced", "fp16") for kind in KINDS)
    what = "the final error is {} to {} times that of uncoded copies, at {} of the bytes"
    yield f"{CORE}/strategies/delta2.py", what, [*coded, short(held)]
    rows = [load("methods")["tables"][kind]["tiers"] for kind in KINDS]
    tiers = span(r["nmse"] / table[0]["nmse"] for table in rows for r in table[1:])
    yield f"{CORE}/strategies/tiered.py", "7/5 bits have {} to {} times the error", tiers
    planted = pick(load("stream_report")["scorers"], data="restless tokens planted", scorer="change")["ratio"]
    yield f"{CORE}/strategies/tiered.py", "(planted ones: {} of the error)", [short(planted)]
    palm, error = cache("tiered.* by palm"), cache("tiered.* by largest error")
    yield f"{CORE}/strategies/tiered.py", "it gains at 2 bits, {} (by ``palm``) and {} (by", [short(palm[0]), short(error[0])]
    yield f"{CORE}/strategies/tiered.py", "loses at 4 ({} to {})", span([palm[1], error[1]])
    anew, frozen = window("wan", "bsa, chosen anew, order 0"), window("wan", "bsa, frozen, order 1")
    yield f"{CORE}/strategies/window.py", "a frozen support has {} of the error of plain order 0", [short(frozen / anew)]
    *_, wan = orders = [window(kind, "bsa, frozen, order 0") / window(kind, "bsa, frozen, order 1") for kind in KINDS]
    yield f"{CORE}/strategies/window.py", "it has {} (WAN) to {} times the error of order 1", [short(wan), short(max(orders))]
    far, rows_of = "{}, order 1, {} far field", ("top 25 %, frozen", "window 25 %")
    for form, words in (("centroid", "The far field of centroids leaves {} to {} of the error"), ("clusters", "that of clusters {} to {}")):
        pairs = [zip(clips(far.format(row, form)), clips(far.format(row, "no")), strict=True) for row in rows_of]
        yield f"{CORE}/strategies/window.py", words, span(a / b for pair in pairs for a, b in pair)
    times = [pick(load("llm_methods")["step"], method=f"window by {what}, density 0.25")["against_plain"] for what in ("nearness", "bsa")]
    yield f"{CORE}/strategies/window.py", "a step takes {} (nearest blocks) to {} (``bsa``) of the time", [short(v) for v in times]
    yield f"{CORE}/strategies/window.py", "has {} to {} times the KL of a plain cache", span(cache("window by .*"), lambda v: f"{v:.1f}")


def before_last(kind: str, method: str) -> float:
    return pick(load("sampler")["tables"][kind]["rows"], method=method)["before_last"]


def best_stock(kind: str, calls: int, figure: str) -> float:
    """A figure of the tuned stock solver with least median error."""
    rows = [r for r in load("sampler")["tables"][kind]["rows"] if r["calls"] == calls and "tuned" in r["method"]]
    return float(min(rows, key=lambda r: r["ode"])[figure])


def calibrated(kind: str, calls: int, figure: str = "ode") -> float:
    """The best stock solver's error over the calibrated sampler's."""
    ours = pick(load("sampler")["tables"][kind]["rows"], method=f"calibrated, {calls} steps")
    return best_stock(kind, calls, figure) / ours[figure]


def pages() -> Iterator[Sentence]:
    fixed = euler_ratio("fixed schedule, order 1, same calls", "tqai balanced, uncoded")
    yield "README.md", "a fixed schedule has {} (Flux), {} (SD3) and {} (WAN) times the error", [f"{v:.1f}" for v in fixed]
    ratios = []
    for table_of in load("methods")["tables"].values():
        for monitor in ("fixed", "schedule"):
            delta, delta2 = (pick(table_of["triples"], scorer="none", strategy=s, monitor=monitor)["nmse"] for s in ("delta", "delta2"))
            ratios.append(delta / delta2)
    yield "docs/methods.md", "`delta` has {} to {} times the error of `delta2`", span(ratios, lambda v: f"{v:.0f}")
    twelve = clips("means of 12 queries at every 2nd step, order 1")
    none, later = clips("control: no attention at every 2nd step, order 1"), clips("control: the same after two more full steps")
    shares = [*span(a / b for a, b in zip(twelve, none, strict=True)), *span(a / b for a, b in zip(twelve, later, strict=True))]
    yield (
        "docs/methods.md",
        'have {} to {} of the error of "no attention at every 2nd step", and {} to {} of the error after two more',
        shares,
    )
    wan = load("dit_peers")["tables"]["wan"]
    ours = pick(wan, peer="tqai", setting="balanced")
    near = [pick(wan, peer="SeaCache", setting="0.25 (default)"), pick(wan, peer="TaylorSeer", setting="lite, every 2, fp32")]
    values = [*(short(r["nmse"] / ours["nmse"]) for r in near), *(f"{100 * (ours['cpu'] / r['cpu'] - 1):.0f}" for r in near)]
    yield "docs/methods.md", "have {} and {} of the error of `balanced`, in {} and {} % more time", values
    mixed = {r["mini"]: f"{r['ratio']:.0f}" for r in load("dit_peers")["pab_guidance"]}
    yield "docs/methods.md", "this costs it {} (WAN) to {} (Flux) times the error", [mixed["wan"], mixed["flux"]]
    tail = [best_stock(kind, 12, "before_last") / before_last(kind, "calibrated, 12 steps") for kind in ("flux", "sd3")]
    yield "docs/sampler.md", "Adams-Bashforth 2 with 12 calls has {} (Flux) and {} (SD3) times the error", [f"{v:.1f}" for v in tail]
    gains = [calibrated("wan", 10), calibrated("wan", 10, "mean"), calibrated("wan", 8)]
    yield "docs/sampler.md", "has {} times the error by the median over seeds, and {} times by the mean", [f"{v:.1f}" for v in gains[:2]]
    yield "docs/sampler.md", "with 8 calls the ratio is {}", [f"{gains[2]:.1f}"]
    dense = [r["over_sdpa"] for r in load("attention")["speed"] if (r["dtype"], r["method"]) == ("bf16", "products")]
    yield "docs/sparse.md", "a softmax are {} to {} times as fast", span(dense, lambda v: f"{v:.1f}")


def sentences() -> Iterator[Sentence]:
    for group in (codecs, presets, monitors, scorers, strategies, pages):
        yield from group()


def place(sentence: Sentence, text: str) -> re.Match[str] | None:
    """Where the sentence stands in its file; None unless once."""
    pieces = [re.sub(r"(\\?\s)+", r"\\s+", re.escape(piece)) for piece in sentence[1].split("{}")]
    found = list(re.finditer(f"({NUMBER})".join(pieces), text))
    return found[0] if len(found) == 1 else None


def fill(texts: dict[str, str]) -> list[str]:
    """Write every figure into ``texts``; sentences that their file does not have once."""
    lost = []
    for sentence in sentences():
        name, _, values = sentence
        found = place(sentence, texts[name])
        if found is None or len(found.groups()) != len(values):
            lost.append(f"{name}: {sentence[1]}")
            continue
        text = texts[name]
        for i in range(len(values), 0, -1):  # from the last, so that places before it stay
            text = text[: found.start(i)] + values[i - 1] + text[found.end(i) :]
        texts[name] = text
    return lost
