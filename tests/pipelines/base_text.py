"""Tiny text encoders, for the pipelines that take no embeddings: a tokenizer of single letters, built without a network."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .base import WIDTH, random

LETTERS = 128  # entries of the vocabulary
CHAT = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    entries = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {chr(i): i for i in range(3, LETTERS)}
    letters = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    marks = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=CHAT, **marks)


def language_model(name: str = "Qwen2") -> Any:
    """A tiny random ``<name>ForCausalLM`` of transformers whose hidden states are ``[1, n, WIDTH]``."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=LETTERS, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return random(getattr(transformers, f"{name}ForCausalLM"), config=config)
