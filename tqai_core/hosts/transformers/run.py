"""``tqai run`` on a language model of transformers."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer
from transformers.utils import logging

import tqai_core

from ...attention.backends import native
from ...config import Config
from ...errors import TqaiError
from ...peak import Peak
from ...text import MAX_TOKENS, first_line, output_of
from ...types import nbytes, tensors_in
from ..language import PAYS, packing_starts
from . import minis as mini

BLOCK = 64  # tokens read at once when distributions are compared
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of the class names that write text


class Bytes:
    """The mini's tokenizer: a token is a byte."""

    chat_template = None

    def decode(self, tokens: Any, **options: Any) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", "replace")


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    name: str


class Stream(TextStreamer):
    """Prints to ``file`` (None: nowhere) and keeps the time of each token."""

    def __init__(self, tokenizer: Any, file: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.file, self.times = file, list[float]()

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())  # the prompt's own comes before anything is computed
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.file is not None:
            print(text, file=self.file, flush=True, end="\n" if stream_end else "")


def load(args: argparse.Namespace, device: torch.device) -> Loaded:
    """Model and tokenizer. TqaiError in one line for what is no causal LM, or cannot be loaded."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.demo:
        return Loaded(mini.model().to(device, None if dtype == "auto" else dtype), Bytes(), "demo")
    name = str(folder) if (folder := Path(args.model).expanduser()).is_dir() else args.model
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        about = AutoConfig.from_pretrained(name)
        classes = getattr(about, "architectures", None) or []
        if getattr(about, "is_encoder_decoder", False) or (classes and not any(c.endswith(CAUSAL) for c in classes)):
            kind = ", ".join(classes) or about.model_type
            raise TqaiError(f"{name} is no causal language model ({kind}): give one that AutoModelForCausalLM loads")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except TqaiError:
        raise
    except ImportError as error:
        raise TqaiError(f"{name}: {first_line(error)}: install what it names") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:  # whatever the loading code meets in a broken folder
        cure = "give a folder or hub id with config.json, weights and tokenizer files that AutoModelForCausalLM loads"
        raise TqaiError(f"cannot load {name}: {first_line(error)}; {cure}") from None
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model.generation_config, "cache_implementation", None):
        model.generation_config.cache_implementation = None  # each run brings its own cache
    return Loaded(model.eval().requires_grad_(False).to(device), tokenizer, name)


def encode(loaded: Loaded, prompt: str, chat: bool | None) -> Tensor:
    """``[1, tokens]``, through the chat template where there is one and ``chat`` is not False."""
    tokenizer = loaded.tokenizer
    if chat and not tokenizer.chat_template:
        raise TqaiError(f"--chat asked, but the tokenizer of {loaded.name} has no chat template: leave it out")
    if isinstance(tokenizer, Bytes):
        return torch.tensor([list(prompt.encode())])
    if tokenizer.chat_template and chat is not False:
        words = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(words, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise TqaiError(f"the tokenizer of {loaded.name} makes no token of this prompt: give another one")
    if int(ids.max()) >= loaded.model.get_input_embeddings().num_embeddings:
        raise TqaiError(f"the tokenizer of {loaded.name} has tokens that its model does not: take the two from one place")
    return ids.long()


def run(args: argparse.Namespace, config: Config, device: torch.device, loaded: Loaded | None = None) -> dict[str, Any]:
    loaded = loaded or load(args, device)
    model = loaded.model
    ids = encode(loaded, args.prompt, args.chat).to(device)
    count = args.max_tokens or MAX_TOKENS["demo" if args.demo else "model"]
    temperature = 0.8 if args.demo and args.temperature is None else args.temperature
    options: dict[str, Any] = {"max_new_tokens": count, "attention_mask": torch.ones_like(ids)}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None}
    if model.generation_config.pad_token_id is None:
        ends = model.generation_config.eos_token_id
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else ends if ends is not None else 0
    notes: list[str] = []
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and ids.shape[1] + count > longest:
        notes.append(f"{ids.shape[1]} + {count} tokens are more than the {longest} positions this model was made for")

    def generate(cache: Any, file: Any = None, **over: Any) -> tuple[dict[str, Any], Tensor]:
        stream = Stream(loaded.tokenizer, file)
        torch.manual_seed(args.seed)
        with Peak(device) as peak:
            out = model.generate(ids, past_key_values=cache, streamer=stream, **{**options, **over})
        new = out[0, ids.shape[1] :]
        began, first, last = stream.times[0], stream.times[1], stream.times[-1]
        figures = {
            "prompt_tokens": ids.shape[1], "new_tokens": len(new), "seconds_prefill": first - began, "seconds_decode": last - first,
            "tokens_per_second": (len(new) - 1) / (last - first) if last > first else None,
            "peak": {"bytes": peak.nbytes, "how": peak.how},
            "text": loaded.tokenizer.decode(new.tolist(), skip_special_tokens=True), "tokens": new.tolist(),
        }  # fmt: skip
        return figures, out

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=UserWarning)  # ours are in the report, which is printed
        if args.compare:
            short = dict(max_new_tokens=min(2, count))
            generate(DynamicCache(config=model.config), **short)
            with tqai_core.apply(model, config) as handle:
                generate(handle.cache(), **short)
            if device.type == "cpu" and config.codec != "exact":
                native.ready()  # builds the kernel on first use
        with tqai_core.apply(model, config) as handle:
            cache = handle.cache()
            mine, _ = generate(cache, None if getattr(args, "quiet", False) else output_of(args))
            report = handle.report()
        sites = report.per_site.values()
        result = {
            "kind": "lm", "model": loaded.name, "prompt": args.prompt, "seed": args.seed, "temperature": temperature,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(device), "config": config.to_dict(), **mine,
            "cache": {
                "bytes_held": cache.nbytes, "bytes_peak": report.bytes_held_peak, "bytes_16bit": report.bytes_exact,
                "tokens": cache.get_seq_length(), "tokens_packed": min((s["tokens_packed"] for s in sites), default=0),
            },
            "report": report.to_dict(), "warnings": notes + report.warnings + _short(cache, config),
        }  # fmt: skip
        if args.compare:
            result["compare"] = _compare(model, config, ids, mine, generate)
            if result["compare"]["kl_mean"] is None:
                result["warnings"].append("the models' next-token distributions hold NaN: no KL")
    return result


def _short(cache: Any, config: Config) -> list[str]:
    """What a user of a short text should know of its speed."""
    if not any(layer.kv.packed for layer in cache.packed_layers) or cache.get_seq_length() >= PAYS:
        return []
    return [f"packing starts at {packing_starts(config)} tokens and saves time from some {PAYS:,} on: shorter texts cost time"]


def _compare(model: Any, config: Config, ids: Tensor, mine: dict[str, Any], generate: Any) -> dict[str, Any]:
    exact = DynamicCache(config=model.config)
    other, whole = generate(exact)
    pairs = zip(mine["tokens"], other["tokens"], strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None and len(mine["tokens"]) != len(other["tokens"]):
        differs = min(len(mine["tokens"]), len(other["tokens"]))
    with tqai_core.apply(model, config) as handle:
        kl = divergence(model, whole, ids.shape[1], handle.cache())
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
