"""Tiny text encoders, for the pipelines that take no embeddings: a tokenizer of single letters, built without a network."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = 128  # entries of the vocabulary


def tokenizer() -> PreTrainedTokenizerFast:
    entries = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {chr(i): i for i in range(3, LETTERS)}
    letters = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
