"""``tqai run`` on a language model of transformers."""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import tqai_core

from ...attention.backends import native
from ...config import Config
from ...errors import TqaiError
from ...text import MAX_TOKENS, output_of
from ...types import nbytes, tensors_in
from ..language import PAYS, packing_starts
from .conversation import Conversation
from .loading import Loaded, load

BLOCK = 64  # tokens read at once when distributions are compared


def run(args: argparse.Namespace, config: Config, device: torch.device, loaded: Loaded | None = None) -> dict[str, Any]:
    loaded = loaded or load(args, device)
    model, options = loaded.model, _options(args, loaded)
    chat = _chat(args, loaded)

    def conversation(cache: Any) -> Conversation:
        return Conversation(loaded, cache, chat, options, args.seed, args.system)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=UserWarning)  # ours are in the report, which is printed
        if args.compare:  # the first pass of each is slower
            short = {"max_new_tokens": min(2, options["max_new_tokens"])}
            conversation(DynamicCache(config=model.config)).ask(args.prompt, **short)
            with tqai_core.apply(model, config) as handle:
                conversation(handle.cache()).ask(args.prompt, **short)
            if device.type == "cpu" and config.codec != "exact":
                native.ready()  # builds the kernel on first use
        with tqai_core.apply(model, config) as handle:
            talk = conversation(handle.cache())
            turns = _turns(args, talk)
            report = handle.report()
        if not turns:
            raise TqaiError("nothing was asked: give a prompt, as in `tqai run 'Once upon' -m MODEL`")
        sites = report.per_site.values()
        result = {
            "kind": "lm", "model": loaded.name, "prompt": args.prompt, "seed": args.seed, "temperature": _temperature(args),
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(device), "processor": _processor(device),
            "config": config.to_dict(), **turns[-1], "turns": [{k: t[k] for k in ("prompt_tokens", "tokens_read", "text")} for t in turns],
            "cache": {
                "bytes_held": talk.cache.nbytes, "bytes_peak": report.bytes_held_peak, "bytes_16bit": report.bytes_exact,
                "tokens": talk.cache.get_seq_length(), "tokens_packed": min((s["tokens_packed"] for s in sites), default=0),
                "positions": loaded.positions, "positions_left": talk.left, "packing_starts": packing_starts(config), "pays_from": PAYS,
            },
            "report": report.to_dict(), "warnings": _notes(args, loaded, options, turns) + report.warnings + _short(talk.cache, config),
        }  # fmt: skip
        if args.compare:
            result["compare"] = _compare(conversation, args.prompt, config, turns[-1])
            if result["compare"]["kl_mean"] is None:
                result["warnings"].append("the models' next-token distributions hold NaN: no KL")
    return result


def _turns(args: argparse.Namespace, talk: Conversation) -> list[dict[str, Any]]:
    """The turns that the command names, or those that somebody types until the end of the input."""
    file = None if getattr(args, "quiet", False) else output_of(args)
    if args.prompt is not None:
        return [talk.ask(words, file) for words in (args.prompt, *(args.then or ()))]
    print("each line is a turn; the cache keeps what was said. An empty line or the end of the input ends it.", file=file)
    turns = []
    for words in _typed(file):
        turns.append(talk.ask(words, file))
        speed, left = turns[-1]["tokens_per_second"], talk.left
        figures = [f"{talk.cache.get_seq_length():,} tokens in {talk.cache.nbytes:,} B", f"read {turns[-1]['tokens_read']:,} new ones"]
        figures += [f"{speed:.1f} tokens/s"] * bool(speed) + [f"{left:,} tokens left"] * (left is not None)
        print(f"[{'; '.join(figures)}]", file=file, flush=True)
    return turns


def _typed(file: Any) -> Iterator[str]:
    """Lines from the terminal."""
    while True:
        print("> ", end="", file=file, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _chat(args: argparse.Namespace, loaded: Loaded) -> bool:
    """Whether words go through the chat template. TqaiError where one is asked for that is not there."""
    there = bool(loaded.tokenizer.chat_template)
    if args.chat and not there:
        raise TqaiError(f"--chat asked, but the tokenizer of {loaded.name} has no chat template: leave it out")
    if args.system is not None and not (there and args.chat is not False):
        raise TqaiError(f"--system asked, but no chat template is used with {loaded.name}: put it at the beginning of the prompt")
    return there and args.chat is not False


def _temperature(args: argparse.Namespace) -> float | None:
    return 0.8 if args.demo and args.temperature is None else args.temperature


def _options(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """Of ``generate``."""
    settings, temperature = loaded.model.generation_config, _temperature(args)
    options: dict[str, Any] = {"max_new_tokens": args.max_tokens or MAX_TOKENS["demo" if args.demo else "model"]}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None}
    if settings.pad_token_id is None:
        ends = settings.eos_token_id
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else ends if ends is not None else 0
    return options


def _processor(device: torch.device) -> str:
    """What a speed belongs to."""
    from ...measure import machine

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{machine()['cpu']}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type


def _notes(args: argparse.Namespace, loaded: Loaded, options: dict[str, Any], turns: list[dict[str, Any]]) -> list[str]:
    longest, last, count = loaded.positions, turns[-1]["prompt_tokens"], options["max_new_tokens"]
    if longest and last + count > longest:
        return [f"{last} + {count} tokens are more than the {longest} positions this model was made for"]
    return []


def _short(cache: Any, config: Config) -> list[str]:
    """What a user of a short text should know of its speed."""
    if not any(layer.kv.packed for layer in cache.packed_layers) or cache.get_seq_length() >= PAYS:
        return []
    return [
        f"packing starts at {packing_starts(config)} tokens and saves time from some {PAYS:,} on: shorter texts cost time, "
        "and --compare shows how much"
    ]


def _compare(conversation: Any, prompt: str, config: Config, mine: dict[str, Any]) -> dict[str, Any]:
    talk: Conversation = conversation(None)
    model = talk.loaded.model
    talk.cache = exact = DynamicCache(config=model.config)
    other = talk.ask(prompt)
    pairs = zip(mine["tokens"], other["tokens"], strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None and len(mine["tokens"]) != len(other["tokens"]):
        differs = min(len(mine["tokens"]), len(other["tokens"]))
    whole = torch.tensor([talk.tokens], device=model.device)
    with tqai_core.apply(model, config) as handle:
        kl = divergence(model, whole, other["prompt_tokens"], handle.cache())
    mean, most = (float(kl.mean()), float(kl.max())) if kl.isfinite().all() else (None, None)
    layers = [vars(layer) for layer in exact.layers]
    cache = {"bytes_held": nbytes(layers), "bytes_16bit": 2 * sum(x.numel() for x in tensors_in(layers))}
    return {**other, "cache": cache, "first_difference": differs, "kl_mean": mean, "kl_max": most, "kl_tokens": len(kl)}


def divergence(model: Any, whole: Tensor, prompt: int, cache: Any) -> Tensor:
    """KL(exact || ``cache``) in nats of every next token after the first ``prompt`` of ``whole [1, n]``: ``fp32 [n - prompt]``.

    Both read the same tokens: the prompt at once, then 64 at a time, which are exact among themselves. Called under one
    ``tqai.apply``, so that a packed cache is read in place; its attention is transformers' own for the exact cache.
    """
    exact, out, last = DynamicCache(config=model.config), list[Tensor](), whole.shape[1] - 1
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start, end in [(0, prompt), *((at, min(at + BLOCK, last)) for at in range(prompt, last, BLOCK))]:
        options, keep = (last_only, 1) if start == 0 else ({}, end - start)
        p, q = (model(whole[:, start:end], past_key_values=c, **options).logits[0, -keep:].float().log_softmax(-1) for c in (exact, cache))
        # a token ruled out (-inf) by both adds nothing; KL of equal distributions may round below 0
        terms = F.kl_div(q, p, reduction="none", log_target=True)
        out.append(terms.masked_fill(p.isneginf(), 0.0).sum(-1).clamp_min(0.0))
    return torch.cat(out)
