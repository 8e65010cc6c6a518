"""``tqai try`` on a language model: packed caches of fewer and fewer bits beside the dense one, the smallest one that is close."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ... import run as command
from ...config import preset
from ...minis import lm_text
from ...progress import progress_bar
from ...run_page import sheet
from . import run as host

PRESETS = ("k8v4", "k4v4", "k4v2")  # tried in this order, which is that of their size
HEAD = ["cache", "bytes held", "times smaller", "tokens/s", "prompt, seconds", "KL, mean nats", "largest", "first other token"]
TOKENS = {"demo": 4096, "model": 4096}  # of a prompt that nobody gave: packing pays from some thousands on
LETTERS = 4  # of a token of a real tokenizer, about


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    until, spent, rows = time.perf_counter() + 60 * args.minutes, 0.0, list[dict[str, Any]]()
    given = _arguments(args)
    with progress_bar("loading") as tell:
        loaded = host.load(given, device)
        for nth, name in enumerate(PRESETS):
            if rows and time.perf_counter() + spent > until:
                break
            tell(name, 0.1 + 0.3 * nth)
            began = time.perf_counter()
            rows.append({"setting": name, **host.run(given, preset(name), device, loaded)})
            spent = time.perf_counter() - began
    return _told(args, loaded.name, rows)


def _arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Those of ``tqai run``, which does the work: greedy, beside the dense cache, and no word of the text printed."""
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    given = parser.parse_args(["", *(["--demo"] if args.mini else ["-m", args.model])])
    prompt = args.prompt or _prompt(args.mini)
    over = {"prompt": prompt, "compare": True, "temperature": 0.0, "max_tokens": args.max_tokens or 128, "json": "", "quiet": True}
    vars(given).update(over, seed=args.seed, dtype=args.dtype, device=args.device)
    return given


def _prompt(mini: bool) -> str:
    """Source code: of Python, which the mini was not trained on, or of tqai."""
    if mini:
        return bytes(lm_text()[: TOKENS["demo"]].tolist()).decode("utf-8", "replace")
    root = Path(command.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py")))
    return text[: TOKENS["model"] * LETTERS]


def _cells(row: dict[str, Any]) -> list[str]:
    other, cache = row["compare"], row["cache"]
    speed = f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else ""
    kl = ["not a number"] * 2 if other["kl_mean"] is None else [f"{other['kl_mean']:.5f}", f"{other['kl_max']:.4f}"]
    first = "none" if other["first_difference"] is None else f"{other['first_difference']} of {other['new_tokens']}"
    smaller = f"{cache['bytes_16bit'] / cache['bytes_held']:.2f}" if cache["bytes_held"] else ""
    return [row["setting"], f"{cache['bytes_held']:,}", smaller, speed, f"{row['seconds_prefill']:.2f}", *kl, first]


def _dense(row: dict[str, Any]) -> list[str]:
    other = row["compare"]
    speed = f"{other['tokens_per_second']:.1f}" if other["tokens_per_second"] else ""
    ratio = other["cache"]["bytes_16bit"] / other["cache"]["bytes_held"]
    return [
        "exact (DynamicCache)",
        f"{other['cache']['bytes_held']:,}",
        f"{ratio:.2f}",
        speed,
        f"{other['seconds_prefill']:.2f}",
        "",
        "",
        "",
    ]


def chosen(rows: list[dict[str, Any]], most: float) -> dict[str, Any] | None:
    """The smallest cache that is close and smaller than the dense one at 16 bits."""
    near = [row for row in rows if row["compare"]["kl_mean"] is not None and row["compare"]["kl_mean"] <= most]
    near = [row for row in near if row["cache"]["tokens_packed"] and row["cache"]["bytes_held"] < row["cache"]["bytes_16bit"]]
    return min(near, key=lambda row: row["cache"]["bytes_held"], default=None)


def verdict_of(rows: list[dict[str, Any]], best: dict[str, Any] | None, most: float) -> str:
    first = rows[0]
    if not first["cache"]["tokens_packed"]:
        return "It does not help here: nothing was packed. " + next(iter(first["warnings"]), "Give a longer --prompt.")
    if best is None:
        near = min(rows, key=lambda row: row["compare"]["kl_mean"] if row["compare"]["kl_mean"] is not None else float("inf"))
        return (
            f"It does not help here: no cache stays within a mean divergence of {most:g} nats of the exact model and is smaller; the "
            f"closest is {near['setting']}. Ask for less with --kl."
        )
    cache, other = best["cache"], best["compare"]
    text = (
        f"It helps: {best['setting']} holds {cache['tokens']:,} tokens in {cache['bytes_held'] / 2**20:.2f} MiB, "
        f"{cache['bytes_16bit'] / cache['bytes_held']:.2f} times smaller than at 16 bits, with a mean divergence of "
        f"{other['kl_mean']:.5f} nats."
    )
    if best["tokens_per_second"] and other["tokens_per_second"]:
        text += f" It writes {best['tokens_per_second']:.1f} tokens/s, the dense cache {other['tokens_per_second']:.1f}."
    return text


def _paste(args: argparse.Namespace, best: dict[str, Any]) -> list[tuple[str, str]]:
    opened = 'from tqai_core import minis\n\nlm = minis.lm()\ntokens = {"input_ids": minis.lm_text()[None, :600]}\n'
    if not args.mini:
        opened = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer, lm = AutoTokenizer.from_pretrained({args.model!r}), AutoModelForCausalLM.from_pretrained({args.model!r})\n"
            'tokens = tokenizer("your prompt", return_tensors="pt")\n'
        )
    script = (
        f'import tqai_core as tqai\n{opened}handle = tqai.apply(lm, tqai.preset("{best["setting"]}"))\n'
        "out = lm.generate(**tokens, past_key_values=handle.cache(), max_new_tokens=64)\n"
    )
    model, name = "--demo" if args.mini else f"-m {args.model}", best["setting"]
    shell = f'tqai run "your prompt" {model} --bits-k {name[1]} --bits-v {name[3]}'
    graph = "Its nodes are for pictures and video: there is nothing to paste for a language model."
    return [("A script", script), ("A shell", shell), ("ComfyUI", graph)]


def _told(args: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    best = chosen(rows, args.kl)
    verdict, title = verdict_of(rows, best, args.kl), f"tqai try: {args.model}"
    paste, shown, exact = _paste(args, best) if best else [], best or rows[0], rows[0]["compare"]
    table = [_dense(rows[0]), *map(_cells, rows)]
    bars = [(what, run["seconds_decode"], f"{run['seconds_decode']:.2f} s for {run['new_tokens']} tokens")
            for what, run in (("exact", exact), *((row["setting"], row) for row in rows))]  # fmt: skip
    texts = [("The exact cache wrote", exact["text"]), (f"{shown['setting']} wrote", shown["text"])]
    notes = list(dict.fromkeys(note for row in rows for note in row["warnings"]))
    about = f"{name}: a prompt of {shown['prompt_tokens']:,} tokens, {shown['new_tokens']} written, greedy"
    place = f"{shown['device']}, {shown['dtype']}, torch {torch.__version__}; times of one run each, the prompt not counted"
    page = args.out / "index.html"
    args.out.mkdir(parents=True, exist_ok=True)
    tables = [("All caches", HEAD, table)]
    page.write_text(sheet(title, verdict, about, bars, texts=texts, tables=tables, paste=paste, notes=notes, place=place), encoding="utf-8")
    rows = [{key: value for key, value in row.items() if key not in ("report", "tokens", "text", "prompt")} for row in rows]
    return {
        "kind": "lm", "title": title, "model": name, "verdict": verdict, "helps": best is not None, "rows": rows, "table": (HEAD, table),
        "best": best["setting"] if best else None, "paste": paste, "page": str(page),
    }  # fmt: skip
