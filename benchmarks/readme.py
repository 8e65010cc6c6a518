"""Write the measured figures of pages and docstrings from benchmarks/results/*.json: no figure is typed by hand.

    python benchmarks/readme.py [--check]

Text between ``<!-- name -->`` and ``<!-- /name -->`` of a page is replaced, figures in sentences are written where ``figures.py`` knows
the sentence, and the charts are drawn anew. ``--check`` changes nothing: it says what is not up to date, and finds the numbers in pages
and docstrings that nothing stands behind (``sources.py``); exit status 1 where there is any.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections import defaultdict
from typing import Any

import figures
import promised
import sources
from bench.alone import FEWER, NMSE, PRESET, PSNR, SSIM
from figures import KINDS, ROOT, e4, load, pick, table
from promised import counts

from tqai_core.config import PRESETS
from tqai_core.minis import names


def minis() -> str:
    """The trained minis, from the logs beside their weights."""
    shapes = {
        "flux": "1 double + 3 single blocks, one head of 128", "sd3": "3 joint blocks, three heads of 64",
        "wan": "4 blocks, one head of 128, 9 frames", "z_image": "1 + 1 refiner and 3 joint blocks, one head of 128",
        "photo": "as flux; photographs of 16 x 16 and 32 x 32 pixels",
    }  # fmt: skip
    rows = []
    for kind, shape in shapes.items():
        log = json.loads((names.folder(kind) / f"{kind}.json").read_text())
        read = f"{log['accuracy'][-1][1]:.2f}" + (" of the frames" if kind == "wan" else "")
        rows.append([kind, shape, f"{log['parameters'] / 1e6:.2f} M", f"{log['cpu_seconds'] / 60:.0f} min", read])
    log = json.loads((ROOT / "benchmarks" / "minis" / "edit.json").read_text())
    last = log["psnr"][-1][1]
    read = f"{last['4']:.1f} dB to the picture asked for, from references of another one {last['other']:.1f}"
    shape = "1 double + 4 single blocks, two heads of 64; 64 to 256 tokens of references"
    rows.append(["edit", shape, f"{log['parameters'] / 1e6:.2f} M", f"{log['cpu_seconds'] / 60:.0f} min", read])
    return table(["mini", "shape", "parameters", "training, CPU", "samples read as asked"], rows)


def lead(dit: dict[str, Any]) -> str:
    """The README's first sentence, without jargon."""
    alone = [pick(dit["tables"][kind]["alone"], method="tqai balanced") for kind in KINDS]
    batch = [pick(dit["tables"][kind]["euler"], method="tqai balanced") for kind in KINDS]
    least, skipped = min(r["cpu"] for r in batch), min(r["skipped"] for r in [*alone, *batch])
    return f"**Pictures and videos {least:.1f}x faster: {skipped:.0%} of the steps of a sampler are predicted instead of computed.**"


def headline(dit: dict[str, Any]) -> str:
    alone = {kind: pick(dit["tables"][kind]["alone"], method="tqai balanced") for kind in KINDS}
    batch = [pick(dit["tables"][kind]["euler"], method="tqai balanced") for kind in KINDS]
    skipped = min(r["skipped"] for r in [*alone.values(), *batch])
    psnr = ", ".join(f"{r['psnr']:.1f} dB, least {r['psnr_worst']:.1f} ({kind}, {dit['alone'][kind]} seeds)" for kind, r in alone.items())
    low, high = min(r["cpu"] for r in batch), max(r["cpu"] for r in batch)
    return (
        f"**{skipped:.0%} or more of the model calls of a 24-step sampler are forecast instead of computed: {low:.2f}x to "
        f"{high:.2f}x faster (batches of {counts(dit['samples'])}), nothing retrained. PSNR to the exact run, one picture or clip at a "
        f"time, median and least: {psnr}.**\n\n{photographs(dit)}"
    )


def photographs(dit: dict[str, Any]) -> str:
    """The same on pictures that are less smooth than digits."""
    rows = dit["tables"]["photo"]["alone"]
    ours, fewer = (pick(rows, method=what.format("balanced")) for what in (PRESET, FEWER))
    told = lambda r: f"{r['psnr']:.1f} dB, least {r['psnr_worst']:.1f}, SSIM {r['ssim']:.3f}, least {r['ssim_worst']:.3f}"  # noqa: E731
    digits = pick(dit["tables"]["flux"]["alone"], method=PRESET.format("balanced"))
    return (
        f"Digits are smooth. On photographs (the photo mini, same class as flux, 32 x 32 pixels, {dit['alone']['photo']} seeds) `balanced` "
        f"forecasts {ours['skipped']:.0%} of the calls: {told(ours)}; {digits['psnr'] - ours['psnr']:.0f} dB less than on digits. Fewer "
        f"steps with as many calls: {told(fewer)}. With 8 steps and fewer: [few](docs/few.md)."
    )


def tail(row: dict[str, Any], name: str) -> list[str]:
    """A figure, its 5 % quantile (errors: 95 %) and the worst; nothing where a result of before has none of these."""
    forms = {"psnr": lambda v: "exact" if v is None else f"{v:.1f}", "ssim": lambda v: f"{v:.4f}"}
    form = forms.get(name, e4)
    return [form(row[key]) if key in row else "" for key in (name, f"{name}_tail", f"{name}_worst")]


def euler(dit: dict[str, Any]) -> str:
    rows = []
    for kind, tables in dit["tables"].items():
        for r in tables["euler"]:
            held = f"{r['held']:,.0f} / {r['fp16']:,.0f}" if r["held"] else ""
            cells = [kind, r["method"], f"{r['calls']:g}", f"{r['skipped']:.0%}" if r["skipped"] else "", f"{r['cpu']:.2f}"]
            rows.append([*cells, *tail(r, "psnr"), *tail(r, "nmse"), f"{r['agreement']:.3f}", held])
    head = ["mini", "method", "calls", "skipped", "CPU ratio", *PSNR, *NMSE, "same label", "bytes held / as fp16"]
    return f"{table(head, rows)}\n\n{batches(dit)}"


def alone(dit: dict[str, Any]) -> str:
    rows = [
        [kind, r["method"], f"{r['calls']:.1f}", *tail(r, "psnr"), *tail(r, "ssim"), *tail(r, "nmse"), f"{r['agreement']:.3f}"]
        for kind in dit["tables"]
        for r in dit["tables"][kind]["alone"]
    ]
    seeds = ", ".join(f"0 to {dit['alone'][kind] - 1} ({kind})" for kind in dit["tables"])
    note = f"Runs of one picture or clip, seeds {seeds}: median, 5 % quantile (of errors 95 %), the worst."
    for name in PRESETS:
        gaps = []
        for kind in dit["tables"]:
            ours, fewer = (pick(dit["tables"][kind]["alone"], method=what.format(name)) for what in (PRESET, FEWER))
            gaps.append(f"{ours['psnr_worst'] - fewer['psnr']:+.1f} dB ({kind})")
        note += f" The least of `{name}` against the median of fewer steps: {', '.join(gaps)}."
    return f"{table(['mini', 'method', 'mean calls', *PSNR, *SSIM, *NMSE, 'same label'], rows)}\n\n{note}"


def multistep(dit: dict[str, Any]) -> str:
    rows = [
        [kind, r["method"], f"{r['calls']:g}", *tail(r, "nmse"), *tail(r, "ode")]
        for kind, tables in dit["tables"].items()
        for r in tables.get("multistep", ())
    ]
    return f"{table(['mini', 'method', 'calls', 'own', *NMSE[1:], 'true ODE', *NMSE[1:]], rows)}\n\n{batches(dit)}"


def solvers(dit: dict[str, Any]) -> str:
    found = [(kind, r) for kind, tables in dit["tables"].items() for r in tables.get("solvers", ())]
    rows = [[kind, r["method"], f"{r['calls']:g}", *tail(r, "ode")] for kind, r in found]
    return f"{table(['mini', 'method', 'calls', 'true ODE, NMSE e-4', *NMSE[1:]], rows)}\n\n{batches(dit)}"


def batches(dit: dict[str, Any]) -> str:
    kinds = list(dit["tables"])
    return (
        f"Batches of {' / '.join(str(dit['samples'][kind]) for kind in kinds)} ({' / '.join(kinds)}), medians over seeds "
        f"{', '.join(map(str, dit['seeds']))}; the quantile and the worst are of single pictures of these batches."
    )


def default(result: dict[str, Any]) -> str:
    """Tuned and untuned, side by side."""
    from bench import default as bench

    _, head, rows = next(iter(bench.tables_of(result)))
    return table(head, rows)


def place(dit: dict[str, Any]) -> str:
    m = dit["machine"]
    return f"Measured on {m['cpu']}, one thread, torch {m['torch']}, diffusers {m['diffusers']}."


def codec(result: dict[str, Any]) -> str:
    rows = []
    for r in result["speed"]:
        speeds = [f"{r[what]:.0f} ({r[f'{what}_ratio']:.2f}x)" for what in ("encode", "decode")]
        rows.append([r["codec"], str(r["bits"]), f"{r['held_bits']:.3f}", f"{r['nmse']:.5f}", *speeds])
    head = ["codec", "bits", "bits held a number", "NMSE", "encode MB/s", "decode MB/s"]
    note = f"On {result['machine']['cpu']}, one thread; x: as fast as upstream's, median over calls made in turn."
    return f"{table(head, rows)}\n\n{note}"


def bases(result: dict[str, Any]) -> str:
    rows = [[r["mini"], r["codec"], f"{r['bits']:.3f}", f"{r['nmse']:.6f}"] for r in result["klt"]]
    return table(["mini", "codec", "bits", "NMSE of keys and values, held-out"], rows)


def streams(result: dict[str, Any]) -> str:
    rows = [["synthetic", r["method"], f"{r['bits']:.3f}", f"{r['nmse']:.2e}", f"{r['held']:,.0f}"] for r in result["synthetic"]]
    rows += [[r["mini"], r["method"], f"{r['bits']:.3f}", f"{r['nmse']:.2e}", f"{r['held']:,.0f}"] for r in result["minis"]]
    return table(["stream", "method", "bits a number a step", "mean NMSE", "bytes held"], rows)


def pictures(demo: dict[str, Any]) -> str:
    """The picture row: same seed, calls and time under each."""
    methods = ["exact", "tqai balanced", "tqai fast", "fewer steps"]
    rows = []
    for kind in KINDS:
        cells = []
        for method in methods:
            r = next(r for r in demo["rows"] if r["mini"] == kind and r["method"] == method)
            name = f"docs/img/{kind}-{method.replace(' ', '-')}.{'gif' if kind == 'wan' else 'png'}"
            note = f"{r['calls']} calls, {r['cpu_ratio']:.2f}x"
            note += "" if r["psnr"] is None else f", {r['psnr']:.1f} dB, least {r['psnr_worst']:.1f}"
            cells.append(f"![{kind} {method}]({name})<br>{note}")
        rows.append(cells)
    single = []
    for kind in KINDS:
        found = {r["method"]: r for r in demo["alone"] if r["mini"] == kind}
        told = ", ".join(f"{name} {r['psnr']:.1f} dB, least {r['psnr_worst']:.1f}" for name, r in found.items())
        single.append(f"{kind} {told}")
    note = (
        f"Batches of {counts(demo['count'])}, seed {demo['seed']}: PSNR of the batch, and the least of one picture. One picture at a time"
    )
    return f"{table(methods, rows)}\n\n{note}, median and least: {'; '.join(single)}."


def tuning(bench: Any, result: dict[str, Any]) -> str:
    from tqai_core.calibrate.tune import PROOF

    return f"{of_bench(bench.tuning, result)}\n\nBatches of 8 / 6 / 2 (flux / sd3 / wan), means over seeds {', '.join(map(str, PROOF))}."


def of_bench(function: Any, result: dict[str, Any]) -> str:
    """A table as the bench makes it."""
    return table(*function(result))


def sections(bench: Any, result: dict[str, Any]) -> str:
    """All tables of a bench as the command prints them."""
    parts = []
    for title, head, rows in bench.tables_of(result):
        parts.append(f"### {title}\n{table(head, rows)}")
    return "\n\n".join(parts)


def levels_of(result: dict[str, Any]) -> str:
    """One table for the README: each mini's attention level and the guidance difference."""
    rows = []
    for kind in KINDS:
        for r in result["tables"][kind]["attention"]:
            held = f"{r['held']:,.0f} / {r['fp16']:,.0f}"
            rows.append([kind, r["method"], f"{r['calls_skipped']:.0%}", f"{r['psnr']:.1f}", e4(r["nmse"]), held])
    return table(["mini", "every 2nd evaluation", "sites skipped", "PSNR dB", "NMSE e-4", "bytes held / as fp16"], rows)


def guidance_of(result: dict[str, Any]) -> str:
    rows = [[kind, r["method"], f"{r['branch_calls']:g}", e4(r["ode"])] for kind in KINDS for r in result["tables"][kind]["guidance"]]
    return table(["mini", "UniPC, shift 3", "branch calls", "true ODE, NMSE e-4"], rows)


def sampler(result: dict[str, Any]) -> str:
    """The best tuned stock solver of each number of calls beside what was calibrated."""
    rows = []
    for kind in result["tables"]:
        stock: dict[float, dict[str, Any]] = {}
        for r in result["tables"][kind]["rows"]:
            if "tuned" in r["method"] and r["ode"] < stock.get(r["calls"], r | {"ode": float("inf")})["ode"]:
                stock[r["calls"]] = r
        best = [id(r) for r in stock.values()]
        for r in result["tables"][kind]["rows"]:
            if "tuned" in r["method"] and id(r) not in best:
                continue
            spread = f"{e4(r['low'])} to {e4(r['high'])}"
            rows.append([kind, r["method"], f"{r['calls']:g}", e4(r["ode"]), e4(r["mean"]), spread, e4(r["unseen"]), e4(r["before_last"])])
    head = ["mini", "sampler", "calls", "true ODE, NMSE e-4", "mean", "over seeds", "labels 5-9", "before last"]
    cost = ", ".join(
        f"{kind} {t['files']['12 steps']['seconds_cpu']:.0f} CPU s and {t['files']['12 steps']['peak'] / t['inference']['peak']:.2f}x the "
        "peak memory of inference"
        for kind, t in result["tables"].items()
    )
    return f"{table(head, rows)}\n\nThe best tuned stock solver of each number of calls. Calibrating 12 steps: {cost}."


def attention_of(bench: Any, result: dict[str, Any]) -> dict[str, str]:
    return {
        "attention": table(*bench.speeds(result)), "attention-clips": table(*bench.clips(result)),
        "attention-sol": table(*bench.sol.cells(result["sol"])),
    }  # fmt: skip


def peers(result: dict[str, Any]) -> str:
    """What beats ``balanced``, then the rows as fast as ``quality`` or faster: what somebody would choose between."""
    figure = lambda r, key: "" if r.get(key) is None else f"{r[key]:.1f}"  # noqa: E731
    rows = []
    for kind in KINDS:
        least = next(r["cpu"] for r in result["tables"][kind] if r["setting"] == "quality")
        for r in result["tables"][kind]:
            if r["failed"]:
                failed = "failed: " + r["failed"].replace("|", "/")[:80]
                rows.append([kind, r["peer"], r["setting"], *[""] * 10, failed, r.get("zero", "")])
            elif r["cpu"] >= least and not r["setting"].startswith("tau="):
                figures = [f"{r['calls']:g}", f"{r['calls'] / result['steps']:.0%}", f"{r['cpu']:.2f}"]
                figures += [*tail(r, "psnr"), figure(r, "psnr_mean"), figure(r, "psnr_sd"), e4(r["nmse"]), e4(r["ode"])]
                rows.append([kind, r["peer"], r["setting"], *figures, f"{r['held']:,.0f}", r.get("zero", "")])
    head = ["mini", "peer", "setting", "calls", "computed", "CPU ratio", "PSNR dB", *PSNR[1:], "mean", "sd"]
    head += ["own, NMSE e-4", "true ODE, NMSE e-4", "bytes held", "threshold 0 exact"]
    seeds = ", ".join(map(str, result["seeds"]))
    note = (
        f"Batches of {counts(result['samples'])} (flux / sd3 / wan), medians over seeds {seeds}; 5 %, least, mean and sd: PSNR of single "
        "pictures of all these (no mean where one is exact). Computed: share of the steps. "
        "Threshold 0 exact: whether it gives the exact run bit for bit, where a "
        "method has a threshold. Spectrum: a form of ours, written from the paper."
    )
    return f"{promised.worse(result)}\n\n{table(head, rows)}\n\n{note}"


def llm_real(result: dict[str, Any]) -> str:
    """Every cache on the real model: 2,048 tokens, 8,192 tokens, variants, needles."""
    from bench import llm_real as bench

    titled = [(title, table(head, rows)) for title, head, rows in bench.tables_of(result | {"verdicts": [], "missing": {}})]
    texts = [text["name"] for text in result["texts"] if text["for"] == "verdict"]
    note = (
        f"Texts that no setting and no calibration saw: {', '.join(texts)} (documentation in packages that `constraints.txt` pins, with "
        "hashes). fp32."
    )
    if own := result["calibration"]:
        note += (
            f" Calibrated in {own['seconds']:.0f} CPU s on other texts. The matrices of a calibration file are held once a model, not once "
            f"a cache, and are not counted: {result['matrices'] / 2**20:.1f} MiB here."
        )
    if result["missing"]:
        note += f" Not measured: {'; '.join(f'{name} ({why})' for name, why in result['missing'].items())}."
    return "\n\n".join([f"{title}:\n\n{text}" for title, text in titled] + [note])


def llm_quality(result: dict[str, Any]) -> str:
    """Every cache on the mini and its two variants."""
    kinds = ("plain", "outlier", "bias")
    at = {(r["variant"], r["cache"], r["bits"]): r for r in result["quality"]}
    rows = []
    for _, name, bits in (key for key in at if key[0] == "plain" and key[1] != "DynamicCache"):
        own = at["plain", name, bits]
        deltas = [f"{100 * at[kind, name, bits]['delta']:+.3f}" for kind in kinds]
        rows.append(
            [name if name.startswith("tqai k") else f"{name}, {bits} bits", f"{own['held_bits']:.2f}", f"{own['kl'] * 1e4:.2f}", *deltas]
        )
    return table(["cache", "bits held", "KL e-4", "perplexity, %", "outlier keys, %", "key bias, %"], rows)


def llm_speed(result: dict[str, Any]) -> str:
    from bench.llm import fastest_dense

    rows = []
    for r in result["step"]:
        best = fastest_dense(result["step"], r["tokens"])
        rows.append(
            [
                f"{r['tokens']:,}",
                r["method"],
                f"{r['ms']:.2f}",
                f"{best / r['ms']:.2f}",
                f"{r['held_mib']:.2f}",
                f"{r['peak_mib']:.1f}",
            ]
        )
    whole = ", ".join(f"{r['method']} {r['ms']:.2f} ms" for r in result["model"])
    missed = [v["what"] for v in result["verdicts"] if not v["ok"]]
    note = f"A random Qwen2 of 4 layers at 4,096 tokens, a token: {whole}. On {result['machine']['cpu']}, one thread."
    note += " Best dense: cat into memory kept for it (fresh pages each time would triple its time), then sdpa of grouped heads."
    note += f" Promises missed there: {'; '.join(missed)}." if missed else " Every promise of the bench met."
    return f"{table(['tokens', 'one layer, one step', 'CPU ms', 'x fastest dense', 'held MiB', 'peak above MiB'], rows)}\n\n{note}"


def llm_whole(result: dict[str, Any]) -> str:
    """Steps and prompts of a whole model."""
    from bench.llm_speed import ARCHITECTURE, PREFILL_LAYERS, cells

    layers, heads, groups = (ARCHITECTURE[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    seconds = {r["method"]: r["s"] for r in result["prefill"]}
    dense, ours, packing = (seconds[name] for name in ("DynamicCache, sdpa", "tqai k4v4", "of it packing"))
    note = f"{layers} layers, {heads} query and {groups} key heads of 64. On {result['machine']['cpu']}; "
    note += "CPU time is that of all threads, waiting included. "
    note += f"A prompt of 4,096 tokens at once through {PREFILL_LAYERS} of the layers, fp32: "
    note += f"{ours / dense:.3f}x the time of DynamicCache; packing takes {packing / ours:.1%} of it."
    return f"{table(*cells(result))}\n\n{note}"


def mlx(result: dict[str, Any]) -> str:
    """Prompt caches of mlx-lm on the mini and its two variants, and a long prompt."""
    at = {(r["variant"], r["cache"], r["bits"]): r for r in result["quality"]}
    rows = []
    for _, name, bits in (key for key in at if key[0] == "plain"):
        own = [at[kind, name, bits] for kind in ("plain", "outlier", "bias")]
        rows.append([name, str(bits), f"{own[0]['held_bits']:.2f}", *(f"{100 * r['delta']:+.2f} %, {r['kl']:.5f}" for r in own)])
    head = ["cache", "bits", "held", "plain: perplexity, KL", "outlier keys", "key bias"]
    note = "; ".join(f"{r['cache']} {r['peak_mib']:.0f} MiB, {r['held_mib']:.0f} held, {r['ms']:.1f} ms" for r in result["long"])
    long = f"A prompt of 4096 tokens, 128 at a time, in a random model of 8 layers: the peak, what stays, CPU time a token after: {note}."
    return f"{table(head, rows)}\n\n{long}"


def kv_of(result: dict[str, Any]) -> str:
    """Methods alone over two and four bits, beside a plain cache of equal bytes."""
    short = {r["method"]: re.sub(r"^(\w+)(:\S*)?", r"`\1`", r["method"]) for r in result["alone"]}
    at = {(short[r["method"]], r["bits"]): r for r in result["alone"]}
    rows = []
    for name in dict.fromkeys(name for name in short.values() if "window" not in name):
        found = [at.get((name, bits)) for bits in ("k2v2", "k4v4")]
        cells = [cell for r in found for cell in (("", "") if r is None else (f"{r['held_bits']:.2f}", f"{r['against_plain']:.2f}"))]
        rows.append([name, *cells])
    return table(["method", "over k2v2: bits held", "KL to plain", "over k4v4: bits held", "KL to plain"], rows)


def comfyui(result: dict[str, Any]) -> str:
    """What the tests marked `shows` found on real ComfyUI, a column a version."""
    versions = result["versions"]
    rows = []
    for name in dict.fromkeys(name for found in versions.values() for name in found):
        rows.append([name, *(cell(found.get(name)) for found in versions.values())])
    note = f"Measured on {result['machine']['cpu']}, torch {result['machine']['torch']}, by `make test-comfyui`."
    return f"{table(['on real ComfyUI', *versions], rows)}\n\n{note}"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if not row["passed"] + row["failed"]:
        return "not in this version"
    tests = row["passed"] + row["failed"]
    note = "yes" if row["passed"] == tests else f"**{row['failed']} of {tests} failed**"
    return note + "".join(f"<br>{figure}" for figure in row["figures"])


def summary(dit: dict[str, Any]) -> str:
    """One row for each thing tqai does, on the first screens of the README."""
    from bench.llm import fastest_dense

    llm, kernels, made, vectors, real = load("llm"), load("attention"), load("sampler"), load("codec"), load("llm_real")
    step = {r["method"]: r for r in llm["step"] if r["tokens"] == 16384}
    own, made_for = (
        next(r for r in real["quality"] if (r["variant"], r["cache"]) == ("plain", f"tqai {name}"))
        for name in ("default (k5v4)", "calibrated, 4.1 bits")
    )
    packed, dense = step["packed, native"], fastest_dense(llm["step"], 16384)
    gains = [
        next(v["measured"] for v in made["verdicts"] if v["mini"] == kind and v["what"].startswith("12 calls: best")) for kind in KINDS
    ]
    best = {r["method"]: r["nmse"] for r in dit["tables"]["wan"]["euler"]}
    wide = next(v["measured"] for v in kernels["verdicts"] if v["what"].startswith("bf16") and "d=0.25, over" in v["what"])
    trellis = next(r for r in vectors["speed"] if (r["codec"], r["bits"]) == ("trellis", 4))
    rows = [
        [
            "a sampler of 16 steps or more (diffusers, ComfyUI)",
            '`tqai.apply(pipe, tqai.preset("balanced"))`',
            f"half of the calls; on WAN {best['plain reuse, same calls'] / best['tqai balanced']:.0f}x less error than reusing "
            f"outputs and {best['fewer Euler steps, same calls'] / best['tqai balanced']:.0f}x less than fewer steps",
            "[steps](docs/steps.md)",
        ],
        ["a distilled model, 4 to 8 steps", '`tqai.apply(pipe, tqai.preset("few"))`', few_row(load("few")), "[few](docs/few.md)"],
        [
            "a minute to calibrate a model",
            "`tqai calibrate --sampler`, then `tqai.CalibratedScheduler`",
            "12 calls: "
            + ", ".join(f"{gain:.1f}x ({kind})" for kind, gain in zip(KINDS, gains, strict=True))
            + " less error to the true ODE than the best tuned stock solver",
            "[sampler](docs/sampler.md)",
        ],
        [
            "a language model (transformers, mlx-lm)",
            "`tqai.KVCache`, or `tqai run`",
            f"KV cache of {own['held_bits']:.1f} bits a number, all counted (SmolLM2: perplexity {100 * own['delta']:+.2f} %), or "
            f"{made_for['held_bits']:.1f} with a file of `tqai calibrate` ({100 * made_for['delta']:+.2f} %), read in "
            f"place: a step at 16k tokens {dense / packed['ms']:.1f}x as fast as the fastest dense one ({llm['machine']['cpu']}), "
            f"{step['DynamicCache as called']['held_mib'] / packed['held_mib']:.1f}x smaller",
            "[llm](docs/llm.md)",
        ],
        [
            "an editing or video pipeline that keeps references (diffusers)",
            '`tqai.apply(pipe, tqai.Config(level="kv"))`',
            dit_kv_row(load("dit_kv")),
            "[dit-kv](docs/dit-kv.md)",
        ],
        [
            "an engine of autoregressive video",
            "`tqai_core.kv.rolling.Rolling`",
            rolling_row(load("rolling")),
            "[dit-kv](docs/dit-kv.md#video-that-grows-block-by-block)",
        ],
        [
            "vLLM, and prompts that begin alike",
            "the tier `TqaiTier` below its offloading, or a connector",
            vllm_row(load("vllm")),
            "[vllm](docs/vllm.md)",
        ],
        [
            "attention over 8k tokens or more",
            '`strategy="window"`, `tqai.attention.block_attention`',
            f"a quarter of the blocks: {wide:.1f}x as fast as the best dense attention in bf16 on a CPU",
            "[sparse](docs/sparse.md)",
        ],
        [
            "tensors to hold or send",
            '`tqai.codec("trellis:bits=4")`',
            f"{trellis['held_bits']:.2f} bits, NMSE {trellis['nmse']:.4f}, encoded {trellis['encode_ratio']:.0f}x as fast as tqai 0.6",
            "[codec](docs/codec.md)",
        ],
        [
            "bits or pipelines to choose",
            "`tqai calibrate`, `tqai tune`, `tqai report`",
            "sensitivity by head, bases by head, searched pipelines, each kept only where unseen seeds agree",
            "[calibration](docs/calibration.md)",
        ],
    ]
    return table(["you have", "you take", "measured", "more"], rows)


def few_row(result: dict[str, Any]) -> str:
    """Preset ``few`` with 8 steps and with 4."""
    from bench import few

    told = []
    for kind, steps in (("photo_8", 8), ("photo_4", 4)):
        rows = [r for r in result["rows"] if (r["mini"], r["steps"]) == (kind, steps)]
        best = pick(rows, method=few.at_level("model", "order 1", steps, few.to_the_end(steps)).name, group="model level")
        told.append(
            f"{steps} steps of a distilled model: {best['cpu']:.2f}x faster at {best['psnr']:.1f} dB, Fréchet distance "
            f"{best['distance'] / rows[0]['distance']:.2f} of the exact run's; fewer steps in the same time {best['psnr_fewer']:.1f} dB "
            f"and {best['distance_fewer'] / rows[0]['distance']:.2f}"
        )
    return ". ".join(told)


def dit_kv_row(result: dict[str, Any]) -> str:
    from bench.dit_kv import BEST, INT8, ROTATED

    last = result["steps"][-1]
    at = {(r["variant"], r["method"]): r["psnr"] for r in result["rows"] if r["steps"] == last and "psnr" in r}
    small = next(r["ratio"] for r in result["bytes"] if r["dim"] == 128 and r["method"] == "tqai 4")
    int8, rotated = (at["plain", BEST] - at["plain", name] for name in (INT8, ROTATED))
    beside = f"{abs(int8):.1f} dB {'above' if int8 >= 0 else 'below'} int8 of twice the bytes"
    return (
        f"keys and values {small:.1f}x smaller than in bf16, {beside}, {rotated:.0f} dB above rotated int4 (trained mini, {last} steps); "
        f"with outlier channels {at['outliers', BEST] - at['outliers', ROTATED]:.0f} dB"
    )


def rolling_row(result: dict[str, Any]) -> str:
    at = {r["method"]: r for r in result["rows"]}
    own = at["tqai, 2 bits"]
    peer = min(row["block_plain"] for name, row in at.items() if name.startswith("k-means") and not name.endswith("counted"))
    return (
        f"keys and values of earlier frames {16 / own['bits']:.1f}x smaller than in bf16, {peer - own['block_plain']:.0f} dB less error of "
        "a block than k-means and int2 at equal bytes (causal mini)"
    )


def vllm_row(result: dict[str, Any]) -> str:
    own = pick(result["quality"], **{"stored as": "k4.3v4"})
    text = f"stored prefixes {own['ratio']:.2f}x smaller, KL {own['kl']:.4f} to a full recompute (SmolLM2)"
    if result["speed"]:
        longest = result["speed"][-1]
        share = longest["packed"] / longest["recomputed"]
        text += f"; {longest['prefix']:,} tokens restored in {share:.2f} of the CPU time of computing them"
    return f"{text}; a damaged block is computed again"


def works() -> str:
    """Which models work, by what they have in common: where tqai acts in them in each host, and what was tried."""
    from tqai_core.families import FAMILIES

    tried = {kind for row in load("pipelines")["rows"] if row["forced"] < row["calls"] for kind in row["transformer"].split(", ")}
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    has_mini = lambda f: (ROOT / "tqai_core" / "minis" / f"{f.name}.json").exists()  # noqa: E731
    for f in sorted(FAMILIES.values(), key=lambda f: (not f.tolerances, not has_mini(f))):
        trained = has_mini(f)
        evidence = "trained mini, tuned" if f.tolerances else "trained mini, untuned" if trained else "real classes, tiny random weights"
        classes = {path.partition(":")[2] for path in f.diffusers.classes} if f.diffusers else set()
        here = ", ".join(f.diffusers.levels) if f.diffusers and classes & tried else ""
        there = ", ".join(f.comfyui.levels if f.comfyui.blocks else ("model",)) if f.comfyui else ""
        groups[evidence, here, there].append(f.title)
    rows = [["; ".join(titles), here, there, evidence] for (evidence, here, there), titles in groups.items()]
    return table(["model", "diffusers: levels", "ComfyUI: levels", "tried on"], rows)


def samplers(result: dict[str, Any]) -> str:
    """ComfyUI's samplers on the minis, the smallest gain over fewer steps first and the runs that are left exact last."""

    def gain(row: dict[str, Any]) -> float:
        return math.inf if row["fewer"] is None else row["ours"] - row["fewer"]

    def figure(value: float | None) -> str:
        return "" if value is None else "exact" if value >= 200 else f"{value:.1f}"

    rows = []
    for r in sorted(result["rows"], key=gain):
        cells = [r["kind"], r["sampler"], f"{r['shift']:g}", f"{r['calls']:g} of {r['whole']:g}"]
        rows.append([*cells, *(figure(r[name]) for name in ("ours", "ours_min", "fewer", "fewer_min"))])
    head = ["mini", "sampler", "shift", "calls", "PSNR dB", "least", "fewer steps", "least"]
    seeds = ", ".join(map(str, result["seeds"]))
    told = f"24 steps, scheduler simple, seeds {seeds}: medians and the least; fewer steps make at least as many calls."
    return f"{table(head, rows)}\n\n{told}"


def breadth(result: dict[str, Any]) -> str:
    """ComfyUI's models with small random weights, the smallest gain over fewer steps first and what stays exact last."""

    def gain(item: tuple[str, dict[str, Any]]) -> float:
        return item[1]["fewer"] / item[1]["error"] if item[1]["fewer"] else math.inf

    def figure(error: float | None) -> str:
        return f"{-20 * math.log10(error):.1f}" if error else ""

    rows = []
    for name, r in sorted(result["rows"].items(), key=gain):
        last = ", ".join(r["levels"]) if r["fewer"] else f"exact: {'; '.join(r['why'])}"
        rows.append([name, f"`{r['class']}`", f"{r['forecast']} of {r['of']}", figure(r["error"]), figure(r["fewer"]), last])
    head = ["model", "class", "steps forecast", "dB", "fewer steps, dB", "levels"]
    return f"{table(head, rows)}\n\nComfyUI {result['version']}, Euler, guidance 3."


def families() -> str:
    """The models that are known below level model, by their classes."""
    from tqai_core.families import FAMILIES

    rows = [
        [f.name, *(", ".join(f"`{c.partition(':')[2]}`" for c in host.classes) if host else "" for host in (f.diffusers, f.comfyui))]
        for f in FAMILIES.values()
    ]
    return table(["family", "diffusers", "ComfyUI"], rows)


def get() -> dict[str, str]:
    """The first commands. The address of the repository is that of pyproject.toml, which a publisher changes."""
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    nodes = (f"git clone {address} custom_nodes/tqai", "python custom_nodes/tqai/tests/comfyui/mini.py .", "python main.py --cpu")
    shell = (
        f"git clone {address} tqai", "cd tqai", "make demo", ".venv/bin/tqai try -m flux  # pictures: one page, one verdict",
        ".venv/bin/tqai try -m lm  # text: how much smaller its memory gets, how fast it writes",
    )  # fmt: skip
    return {name: "\n".join(["```sh", *lines, "```"]) for name, lines in (("get-comfyui", nodes), ("get", shell))}


def parts() -> dict[str, str]:
    from bench import attention, calibrate, dit_kv, few, levels, llm_methods, methods, pipelines, rolling, stream_report, vllm

    dit, vectors, lower, kernels = (load(name) for name in ("dit", "codec", "levels", "attention"))
    lm, caches, made = (load(name) for name in ("llm", "llm_methods", "calibrate"))
    return {
        **promised.parts(), **get(), "minis": minis(), "families": families(), "samplers": samplers(load("samplers")),
        "works": works(), "bed": sections(pipelines, load("pipelines")),
        "lead": lead(dit), "headline": headline(dit),
        "euler": euler(dit), "alone": alone(dit), "multistep": multistep(dit), "solvers": solvers(dit),
        "place": place(dit), "pictures": pictures(load("demo")), "summary": summary(dit), "codec": codec(vectors), "bases": bases(vectors),
        "default": default(load("default")),
        "streams": streams(load("stream")), "comfyui": comfyui(load("comfyui")), "comfyui-families": breadth(load("comfyui_breadth")),
        "levels": levels_of(lower), "guidance": guidance_of(lower),
        "sampler": sampler(load("sampler")),
        **{name: of_bench(getattr(calibrate, name), made) for name in ("calibration", "allocation")}, "tuning": tuning(calibrate, made),
        **attention_of(attention, kernels), "llm-real": llm_real(load("llm_real")),
        "llm": f"{llm_quality(lm)}\n\n{llm_speed(lm)}", "llm-speed": llm_whole(load("llm_speed")),
        "kv": kv_of(caches), "mlx": mlx(load("mlx")),
        "methods": sections(methods, load("methods")), "levels-all": sections(levels, lower), "peers": peers(load("dit_peers")),
        "kv-all": sections(llm_methods, caches), "attention-all": sections(attention, kernels),
        "few": sections(few, {**load("few"), "verdicts": []}),
        "dit-kv": sections(dit_kv, {**load("dit_kv"), "verdicts": []}), "pipelines": sections(stream_report, load("stream_report")),
        "rolling": sections(rolling, {**load("rolling"), "verdicts": []}),
        "vllm": sections(vllm, {**load("vllm"), "verdicts": []}),
    }  # fmt: skip


def fill(texts: dict[str, str]) -> None:
    """Replace what lies between the marks, each on one page."""
    pages = [str(page.relative_to(ROOT)) for page in sources.PAGES]
    for name, part in parts().items():
        found = [page for page in pages if f"<!-- {name} -->" in texts[page]]
        if len(found) != 1 or texts[found[0]].count(f"<!-- {name} -->") != 1:
            raise SystemExit(f"{name!r} has a place in {found}, expected one")
        text = part if "/" not in found[0] else part.replace("](docs/", "](")
        marks = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        texts[found[0]] = re.sub(marks, lambda m, p=text: f"{m[1]}\n{p}\n{m[2]}", texts[found[0]], flags=re.S)


def charts() -> dict[str, str]:
    from bench import attention, codec, llm

    return {
        f"benchmarks/results/{name}.svg": bench.plot(load(name)) + "\n"
        for name, bench in (("attention", attention), ("codec", codec), ("llm", llm))
    }


def main() -> int:
    names = {str(page.relative_to(ROOT)) for page in sources.PAGES} | {sentence[0] for sentence in figures.sentences()}
    texts = {name: (ROOT / name).read_text() for name in sorted(names)}
    fill(texts)
    wrong = [f"figures.py has a sentence that is not there once: {text}" for text in figures.fill(texts)]
    stale = [name for name, text in (texts | charts()).items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    if "--check" in sys.argv:
        wrong += [f"not up to date, run python benchmarks/readme.py: {name}" for name in stale]
    else:
        for name in stale:
            (ROOT / name).write_text((texts | charts())[name])
    wrong += [f"no source for the number: {text}" for text in sources.unsourced()]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
