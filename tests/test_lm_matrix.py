"""Every causal LM class of transformers, tiny and random: the tokens of its own cache where nothing is packed yet, or one sentence."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging

import tqai_core as tqai

sys.path.append(str(Path(__file__).parent))
import tiny_lms

PROMPT, NEW = 40, 24
SOME = ("llama", "qwen3", "gemma2", "gemma3n_text", "gemma4_text", "deepseek_v32", "deepseek_v3", "gpt2", "mpt", "gpt_oss", "phi3", "bloom")
EXACT = tqai.Config(level="kv", codec="exact")
WAITING = tqai.Config(level="kv", calibrate=0)  # packs from 100 tokens on: read through our layers, and exact up to there


def generate(model: Any, cache: Any) -> torch.Tensor:
    ids = torch.randint(3, tiny_lms.VOCAB - 1, (1, PROMPT), generator=torch.Generator().manual_seed(5))
    return model.generate(ids, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, PROMPT:]


def outcomes(model: Any, want: torch.Tensor) -> dict[str, str]:
    """What each way of use gives: "same", "other tokens from N", or the sentence that refuses it."""

    def applied(config: tqai.Config) -> torch.Tensor:
        with tqai.apply(model, config) as handle:
            return generate(model, handle.cache())

    def bare(config: tqai.Config) -> torch.Tensor:
        return generate(model, tqai.KVCache(model.config, config))

    out = {}
    for name, way, config in (
        ("exact", applied, EXACT), ("exact, bare", bare, EXACT), ("waiting", applied, WAITING), ("waiting, bare", bare, WAITING),
    ):  # fmt: skip
        try:
            got = way(config)
            same = torch.equal(got, want)
            out[name] = "same" if same else f"other tokens from {int((got != want).nonzero()[0])}"
        except tqai.TqaiError as error:
            out[name] = f"refused: {error}"
        except Exception as error:  # seen in the table, and wrong
            out[name] = f"other error: {type(error).__name__}: {error}"
    return out


def check(kind: str) -> dict[str, str]:
    logging.set_verbosity_error()
    try:
        model = tiny_lms.build(kind)
    except Exception as error:  # whatever a class says of sizes it was not made for
        return {"no tiny model": " ".join(f"{type(error).__name__}: {error}".split())[:150]}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        try:
            want = generate(model, DynamicCache(config=model.config))
        except Exception as error:  # whatever a library raises on its own cache
            return {"transformers' own cache fails": " ".join(f"{type(error).__name__}: {error}".split())[:150]}
        return outcomes(model, want)


@pytest.mark.parametrize("kind", SOME)
def test_a_family_gives_its_own_tokens_or_is_refused(kind):
    found = check(kind)
    assert "exact" in found, found
    assert all(text == "same" or text.startswith("refused") for text in found.values()), found


@pytest.mark.parametrize("kind", SOME)
def test_sdpa_reads_packed_rows_as_it_would_dense_values(kind, monkeypatch):
    """A bare cache, 8 bits, one token after the other: in place where it can be, and the logits of dense values."""
    from tqai_core.attention import lazy

    model, ids = tiny_lms.build(kind), torch.randint(3, tiny_lms.VOCAB - 1, (1, 150), generator=torch.Generator().manual_seed(5))
    config = tqai.Config(level="kv", codec="turbo:bits=8", recent=8, calibrate=0)

    def logits() -> tuple[torch.Tensor, Any]:
        cache = tqai.KVCache(model.config, config)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(ids[:, :130], past_key_values=cache)
            return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(130, 150)]), cache

    try:
        got, cache = logits()
    except tqai.TqaiError:
        return  # said in a sentence; the test above looks at those
    monkeypatch.setattr(lazy, "_in_place", lambda *args, **kw: None)
    want, dense = logits()
    assert float((got - want).square().sum() / want.square().sum()) < 1e-6
    assert all(a.kv.packed == b.kv.packed for a, b in zip(cache.packed_layers, dense.packed_layers, strict=True))
    if kind in ("llama", "qwen3", "phi3", "gpt2"):
        assert cache.packed_layers[0].kv.packed > 0
        assert (cache.materialised, dense.materialised > 0) == (0, True)


@pytest.mark.slow
def test_every_class_gives_its_own_tokens_or_is_refused(capsys):
    table = {kind: check(kind) for kind in tiny_lms.KINDS if kind in tiny_lms.CONFIGS}
    with capsys.disabled():
        for line in report(table):
            print(line)
    wrong = {kind: found for kind, found in table.items() if any(text.startswith("other") for text in found.values())}
    assert not wrong
    assert sum("exact" in found for found in table.values()) >= 165, "most classes have a tiny model that runs"


def report(table: dict[str, dict[str, str]]) -> list[str]:
    """The classes that give their own tokens, and the sentences of the others, each with the classes that get it."""
    lines, why = [], dict[str, list[str]]()
    same = [kind for kind, found in table.items() if set(found.values()) == {"same"}]
    for kind, found in table.items():
        for way, text in found.items():
            if text != "same":
                why.setdefault(f"{way}: {text}", []).append(kind)
    lines.append(f"\n{len(same)} of {len(table)} classes give the same tokens in every way: {', '.join(same)}")
    return lines + [f"- {text} [{', '.join(kinds)}]" for text, kinds in sorted(why.items())]
