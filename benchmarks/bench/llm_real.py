"""``tqai bench llm --real``: caches of a real language model (`make real-lm`) on texts that no setting and no calibration ever saw.

A text is read once by the exact model, and what its attention met is recorded. Each cache is then filled with the first part of it as in a
prefill, and the model reads the rest through the cache, 32 tokens at a time. Perplexity, KL and the rest are of those tokens, against
the exact run; bits count everything that the cache holds at the end. A row is kept as soon as it is measured (``out/bench-llm-real.json``):
a stopped run goes on behind it, and a row is measured again when the code that it depends on has changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import tqai_core
from tqai_core.calibrate.run import calibrate
from tqai_core.config import Config, preset
from tqai_core.errors import TqaiError
from tqai_core.files import write_text
from tqai_core.hosts.calibration_targets import Language, Windows
from tqai_core.hosts.transformers.cache import KVCache
from tqai_core.hosts.transformers.minis import harden
from tqai_core.kv.calibrated import load
from tqai_core.types import nbytes

from . import lm_caches, real_texts
from .harness import Row, Table, closing, machine, one_thread, promises
from .real_texts import CHOICE, VERDICT

ROOT = Path(__file__).resolve().parents[2]
KEPT, CALIBRATION = ROOT / "out/bench-llm-real.json", ROOT / "out/real-lm.calibration.safetensors"
CHUNK = 32  # tokens read together through a cache
SCORED = {2048: 512, 8192: 256}  # last tokens of a text of so many that are scored
TEXTS = {2048: VERDICT, 8192: VERDICT[:1]}
VARIANTS = ("plain", "outlier", "bias")
NEEDLES = 12
NAMES = (
    "Alden", "Brook", "Carver", "Dalton", "Ellis", "Foster", "Granger", "Holden", "Irving", "Jensen", "Keller", "Lowell",
)  # fmt: skip
DEFAULT, SMALL, FILE = "tqai default (k5v4)", "tqai k4v2", "tqai calibrated, 4.1 bits"
PACKED, OWN = ("kv", "codecs", "attention", "hosts/transformers", "hosts/language.py", "config.py"), ("lm_caches.py", "real_texts.py")
SLOW = {"hqq": "its encoder, run again over all tokens every 32, takes more time than all other rows together"}
PROTOCOL = 2  # counts the changes of how rows are measured


def ours() -> dict[str, Config]:
    """The configurations of tqai that are measured at 2,048 tokens."""
    file = {"name": "turbo", "file": str(CALIBRATION)}
    return {
        DEFAULT: Config(level="kv"), "tqai k8v4": preset("k8v4"), "tqai k4v4": preset("k4v4"), SMALL: preset("k4v2"),
        "tqai k3v2": preset("k3v2"), "tqai k2v2": preset("k2v2"),
        FILE: Config(level="kv", codec=file | {"average": 4.1}, recent=12),
        "tqai calibrated, 3 bits": Config(level="kv", codec=file | {"bits": 3}, recent=12),
    }  # fmt: skip


# -- rows that are kept


def _hash(folder: Path, names: Iterable[str]) -> str:
    """Of all code in some files and folders."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        for file in [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.c")]):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Kept:
    """Measured rows in a file, each with a hash of what it depends on."""

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Kept:
        return cls(path, json.loads(path.read_text()) if path.exists() else {})

    def get(self, name: str, code: str, measure: Callable[[], Row]) -> Row:
        """The row ``name`` if it was measured with this code, else what ``measure`` gives, kept."""
        if self.rows.get(name, {}).get("code") != code:
            began = time.process_time()
            row = measure()
            self.rows |= Kept.load(self.path).rows | {name: {"code": code, "cpu": time.process_time() - began, **row}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.rows, indent=1))
        return {key: value for key, value in self.rows[name].items() if key != "code"}


# -- the exact run


_seen: list[tuple[Tensor, Tensor, Tensor]] = []


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    _seen.append((query, key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("tqai_bench_records", _record)
AttentionMaskInterface.register("tqai_bench_records", sdpa_mask)


@dataclass
class Exact:
    """Texts as the exact model reads them: ids ``[texts, n]``, what each layer's attention met, hidden states ``[texts, n, d]``."""

    lm: Any
    ids: Tensor
    layers: list[tuple[Tensor, Tensor, Tensor]]
    hidden: Tensor

    @classmethod
    @torch.no_grad()
    def read(cls, lm: Any, ids: Tensor) -> Exact:
        with _attention(lm, "tqai_bench_records"):
            _seen.clear()
            hidden = lm.model(ids, use_cache=False).last_hidden_state
            layers = list(_seen)
            _seen.clear()
        return cls(lm, ids, layers, hidden)

    def fill(self, cache: Any, count: int) -> None:
        """Give ``cache`` the first ``count`` tokens of each layer, as a prefill does."""
        for i, parts in enumerate(self.layers):
            q, k, v = (x[:, :, :count] for x in parts)
            cache.update(k, v, i)
            if isinstance(cache, KVCache):
                kv = cache.packed_layers[i].kv
                kv.observe(q)
                kv.settle()

    def logits(self, first: int, last: int) -> Tensor:
        """Log probabilities of the next token ``fp32 [texts, last - first, vocabulary]``."""
        return self.lm.lm_head(self.hidden[:, first:last]).float().log_softmax(-1)


@contextmanager
def _attention(lm: Any, name: str) -> Iterator[None]:
    before = lm.config._attn_implementation
    lm.set_attn_implementation(name)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


@contextmanager
def _cache(lm: Any, make: Config | Callable[[], Any]) -> Iterator[Any]:
    """An empty cache, of tqai with its attention."""
    if isinstance(make, Config):
        with tqai_core.apply(lm, make) as handle:
            yield handle.cache()
    else:
        yield make()


@torch.no_grad()
def score(exact: Exact, make: Config | Callable[[], Any]) -> Row:
    """One cache on all texts."""
    n, lm = exact.ids.shape[1], exact.lm
    first, kl, top, nats, own = n - SCORED[n], [], [], 0.0, 0.0
    with _cache(lm, make) as cache:
        exact.fill(cache, first)
        for at in range(first, n, CHUNK):
            q = lm(exact.ids[:, at : at + CHUNK], past_key_values=cache).logits.float().log_softmax(-1)
            p, target = exact.logits(at, at + CHUNK), exact.ids[:, at + 1 : at + CHUNK + 1]
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            top.append((p.argmax(-1) == q.argmax(-1)).flatten())
            for x, name in ((p, "exact"), (q, "own")):
                lost = float(F.nll_loss(x[:, : target.shape[1]].flatten(0, 1), target.flatten(), reduction="sum"))
                nats, own = (nats + lost, own) if name == "exact" else (nats, own + lost)
        held = cache.nbytes if isinstance(cache, KVCache) else sum(nbytes(vars(layer)) for layer in cache.layers)
        if isinstance(cache, KVCache) and cache.materialised:
            raise RuntimeError("a fused run made dense values")
    every, count = torch.cat(kl), len(exact.ids) * (SCORED[n] - 1)
    numbers = sum(k.numel() + v.numel() for _, k, v in exact.layers)
    return {
        "tokens": n, "held_bits": 8 * held / numbers, "perplexity": math.exp(own / count), "delta": math.exp((own - nats) / count) - 1,
        "kl": float(every.mean()), "top1": float(torch.cat(top).float().mean()), "worst": float(every.max()),
    }  # fmt: skip


# -- needles


def haystack(tokenizer: Any, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """A text of ``count`` tokens with a sentence on each of twelve people spread over it, and the (question, answer) of each."""
    g = torch.Generator().manual_seed(count)
    numbers = torch.randint(1000, 9999, (NEEDLES,), generator=g).tolist()
    hidden = [tokenizer(f"\n\nThe locker number of {name} is {n}.\n\n")["input_ids"] for name, n in zip(NAMES, numbers, strict=True)]
    text = VERDICT[1].tokens(tokenizer, 8192)[: count - sum(map(len, hidden))].tolist()
    out: list[int] = []
    for i, sentence in enumerate(hidden):
        out += text[len(text) * i // NEEDLES : len(text) * (i + 1) // NEEDLES] + sentence
    asked = [(f"\n\nThe locker number of {name} is", f" {n}") for name, n in zip(NAMES, numbers, strict=True)]
    return torch.tensor([out]), asked


@torch.no_grad()
def find(exact: Exact, tokenizer: Any, asked: Sequence[tuple[str, str]], make: Config | Callable[[], Any]) -> Row:
    """How many of the numbers greedy decoding finds."""
    found = 0
    with _cache(exact.lm, make) as cache:
        exact.fill(cache, exact.ids.shape[1])
        for question, answer in asked:
            q, a = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (question, answer))
            out = exact.lm(torch.cat([q, a], 1), past_key_values=copy.deepcopy(cache)).logits[0]
            found += bool((out[q.shape[1] - 1 : -1].argmax(-1) == a[0]).all())
    return {"tokens": exact.ids.shape[1], "found": found, "of": len(asked)}


# -- the bench


class Bench:
    """One run: the model, its tokenizer, the rows."""

    def __init__(self, folder: Path, peers: bool, tell: Callable[[str], None]) -> None:
        self.folder, self.peers, self.tell = folder, peers, tell
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.kept = Kept.load(KEPT)
        self.own = f"{PROTOCOL} {_hash(Path(__file__).parent, OWN)} "
        self.all = self.own + _hash(Path(tqai_core.__file__).parent, PACKED)
        self.missing: dict[str, str] = real_texts.missing((*CHOICE, *VERDICT))

    def model(self, variant: str = "plain") -> Any:
        lm = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval().requires_grad_(False)
        harden(lm, variant)
        return lm

    def calibration(self) -> Row:
        """Make the calibration file, from the texts of the choice alone."""
        code = _hash(Path(tqai_core.__file__).parent, ("calibrate", "codecs", "kv")) + self.own

        def measure() -> Row:
            self.tell("calibrating")
            CALIBRATION.unlink(missing_ok=True)
            ids = torch.cat([text.tokens(self.tokenizer, 8192) for text in CHOICE])
            made = calibrate(Language(self.model(), Windows(ids, 1)), CALIBRATION)
            return {"seconds": made.header["seconds_cpu"], "verdict": made.header["verdicts"].get("cache")}

        if not CALIBRATION.exists():
            self.kept.rows.pop("calibration", None)
        return self.kept.get("calibration", code, measure)

    def quality(self, tokens: int, variant: str, names: Sequence[str] | None) -> list[Row]:
        """Rows of the caches ``names``, or of all."""
        makers: dict[str, tuple[int, Config | Callable[[], Any]]] = {name: (0, config) for name, config in ours().items()}
        lm = self.model(variant)
        for bits in (4, 2) if self.peers else ():
            found, why = lm_caches.caches(lm.config, bits)
            self.missing |= why | SLOW
            found = {name: make for name, make in found.items() if name not in SLOW}
            makers |= {f"{name}, {bits} bits": (bits, make) for name, make in found.items()}
        exact: list[Exact] = []
        rows = []
        for name, (bits, make) in makers.items():
            if names is not None and name not in names:
                continue

            def measure(make: Any = make, name: str = name) -> Row:
                if not exact:
                    self.tell(f"{variant}, {tokens} tokens: the exact run")
                    exact.append(Exact.read(lm, torch.stack([text.tokens(self.tokenizer, tokens) for text in TEXTS[tokens]])))
                row = score(exact[0], make)
                figures = f"{row['held_bits']:.2f} bits, {100 * row['delta']:+.2f} %, KL {1e4 * row['kl']:.1f} e-4"
                self.tell(f"{variant}, {tokens}: {name}: {figures}")
                return row

            row = self.kept.get(f"{variant}/{tokens}/{name}", self.own if bits else self.all, measure)
            rows.append({"variant": variant, "cache": name, "bits": bits, **row})
        return rows

    def needles(self, tokens: int) -> list[Row]:
        lm = self.model()
        ids, asked = haystack(self.tokenizer, tokens)
        configs = ours()
        makers: dict[str, Any] = {"exact": lambda: lm_caches.exact(lm.config)}
        makers |= {name: configs[name] for name in (DEFAULT, FILE, SMALL, "tqai k2v2") if name in configs}
        if self.peers:
            makers |= {f"{name}, 4 bits": make for name, make in lm_caches.caches(lm.config, 4)[0].items() if "KIVI" in name}
        exact: list[Exact] = []
        rows = []
        for name, make in makers.items():

            def measure(make: Any = make, name: str = name) -> Row:
                if not exact:
                    self.tell(f"needles, {tokens} tokens: the exact run")
                    exact.append(Exact.read(lm, ids))
                row = find(exact[0], self.tokenizer, asked, make)
                self.tell(f"needles, {tokens}: {name}: {row['found']} of {row['of']}")
                return row

            code = self.all if isinstance(make, Config) else self.own
            rows.append({"cache": name, **self.kept.get(f"needles/{tokens}/{name}", code, measure)})
        return rows


HARD = (DEFAULT, SMALL, "quanto, 4 bits")  # on variants and at 8,192 tokens


def bench(real: str | None = None, peers: bool = True, tell: Callable[[str], None] = lambda text: None) -> Row:
    folder = Path(real or ROOT / "out/real-lm")
    if not (folder / "config.json").is_file():
        raise TqaiError(f"{folder} holds no language model (config.json): run `make real-lm`, or give the folder of one, --real FOLDER")
    one_thread()
    run = Bench(folder, peers, tell)
    result: Row = {"bench": "llm_real", "machine": machine(), "model": "SmolLM2-135M-Instruct" if folder.name == "real-lm" else folder.name}
    result["calibration"] = run.calibration()
    result["quality"] = run.quality(2048, "plain", None)
    for variant in VARIANTS[1:]:
        result["quality"] += run.quality(2048, variant, HARD)
    result["needles"] = [row for tokens in (2048, 4096, 8192) for row in run.needles(tokens)]
    result["quality"] += run.quality(8192, "plain", HARD)
    result["texts"] = [
        {"name": text.name, "package": text.package, "path": text.path, "sha256": text.sha256, "for": kind}
        for kind, texts in (("choice", CHOICE), ("verdict", VERDICT)) for text in texts
    ]  # fmt: skip
    shapes = [shape for pair in load(str(CALIBRATION)).shapes for shape in pair if shape is not None]
    result["matrices"] = nbytes([[shape.matrices, shape.metric] for shape in shapes])
    result["missing"] = run.missing
    result["verdicts"] = verdicts(result)
    return result


def verdicts(result: Row) -> list[Row]:
    """What is promised of the real model; unknown where a row was not measured."""
    out: list[Row] = []
    need = promises(out)
    at = {(r["variant"], r["tokens"], r["cache"]): r for r in result["quality"]}

    def figure(name: str, what: str, variant: str = "plain") -> float:
        return float(at.get((variant, 2048, name), {}).get(what, math.nan))

    known = lambda x: None if math.isnan(x) else x  # noqa: E731
    for name, bits, kl, what in (
        (DEFAULT, 5.2, 20e-4, "default"), (FILE, 4.6, 20e-4, "with a calibration file"), (SMALL, 3.6, 400e-4, "2-bit class (k4v2)"),
    ):  # fmt: skip
        own = figure(name, "kl")
        need(f"{what}: bits, all counted", known(figure(name, "held_bits")), most=bits)
        need(f"{what}: KL", known(own), most=kl)
        for variant in VARIANTS[1:] if name != FILE else ():  # a file is of one model, and a variant is another
            need(f"{what}: KL times that of the plain model, {variant}", known(figure(name, "kl", variant) / own), most=1.2)
        peers = [r for (variant, tokens, _), r in at.items() if (variant, tokens) == ("plain", 2048) and r["bits"]]
        if others := [r["kl"] / own for r in peers if r["held_bits"] <= figure(name, "held_bits")]:
            need(f"{what}: least KL of a peer with no more bits, times ours", min(others), least=2)
    need("default: perplexity lost", known(figure(DEFAULT, "delta")), most=0.003)
    found = {(r["tokens"], r["cache"]): r["found"] for r in result["needles"]}
    for tokens in (2048, 4096, 8192):
        exact, own = found.get((tokens, "exact")), found.get((tokens, DEFAULT))
        need(f"default: needles lost at {tokens:,} tokens", None if exact is None or own is None else exact - own, most=0)
    need("calibration: CPU seconds", result["calibration"] and result["calibration"]["seconds"], most=300)
    return out


def tables_of(result: Row) -> Iterable[Table]:
    for variant, tokens in dict.fromkeys((r["variant"], r["tokens"]) for r in result["quality"]):
        rows = [
            [
                r["cache"], f"{r['held_bits']:.2f}", f"{100 * r['delta']:+.2f}", f"{1e4 * r['kl']:.1f}", f"{100 * r['top1']:.1f}",
                f"{r['worst']:.2f}",
            ]
            for r in result["quality"] if (r["variant"], r["tokens"]) == (variant, tokens)
        ]  # fmt: skip
        title = f"{result['model']}, {variant}, {len(TEXTS[tokens])} texts of {tokens:,} tokens, the last {SCORED[tokens]} scored"
        yield title, ["cache", "bits held", "perplexity, %", "KL e-4", "top-1 kept, %", "worst KL"], rows
    lengths = list(dict.fromkeys(r["tokens"] for r in result["needles"]))
    found = {(r["tokens"], r["cache"]): str(r["found"]) for r in result["needles"]}
    names = dict.fromkeys(r["cache"] for r in result["needles"])
    rows = [[name, *(found.get((n, name), "") for n in lengths)] for name in names]
    yield f"needles found of {NEEDLES}", ["cache", *(f"{n:,} tokens" for n in lengths)], rows
    yield from closing(result)
