"""Turns of one conversation with a language model, all on one cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from ...errors import TqaiError
from ...peak import Peak
from ...text import first_line
from .loading import Loaded


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


@dataclass
class Conversation:
    """What was said, and the cache that holds it.

    A turn appends to the cache: the model reads the new words alone. Where a template changes what was said before (it drops a part, say),
    the cache is cropped to what is common first.
    """

    loaded: Loaded
    cache: Any
    chat: bool  # through the tokenizer's chat template
    options: dict[str, Any]  # of ``generate``
    seed: int = 0
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    said: str = ""  # all that was said, as the template writes it
    tokens: list[int] = field(default_factory=list)  # all of them so far, the last one not read yet

    def ask(self, words: str, file: Any = None, **over: Any) -> dict[str, Any]:
        """One turn; its text goes to ``file`` while it is written. ``over``: options of ``generate`` for this turn."""
        ids, device = self._ids(words), self.loaded.model.device
        kept = self._kept(ids)
        whole, stream = torch.tensor([ids], device=device), Stream(self.loaded.tokenizer, file)
        torch.manual_seed(self.seed)
        with Peak(device) as peak:
            out = self.loaded.model.generate(
                whole, past_key_values=self.cache, streamer=stream, **{**self.options, "attention_mask": torch.ones_like(whole), **over}
            )
        self.tokens, new = out[0].tolist(), out[0, len(ids) :].tolist()
        text = self.loaded.tokenizer.decode(new, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        self.said += text
        began, first, last = stream.times[0], stream.times[1], stream.times[-1]
        return {
            "prompt_tokens": len(ids), "tokens_read": len(ids) - kept, "new_tokens": len(new), "seconds_prefill": first - began,
            "seconds_decode": last - first, "tokens_per_second": (len(new) - 1) / (last - first) if last > first else None,
            "peak": {"bytes": peak.nbytes, "how": peak.how}, "text": text, "tokens": new,
        }  # fmt: skip

    @property
    def left(self) -> int | None:
        """Tokens that still fit into the positions that the model was made for."""
        return None if self.loaded.positions is None else max(self.loaded.positions - len(self.tokens), 0)

    def _ids(self, words: str) -> list[int]:
        """The tokens of everything said so far and of ``words``."""
        name, tokenizer = self.loaded.name, self.loaded.tokenizer
        if self.system and not self.messages:
            self.messages.append({"role": "system", "content": self.system})
        self.messages.append({"role": "user", "content": words})
        new = self._rendered() if self.chat else words
        held = self.tokens if not self.chat or new.startswith(self.said) else []
        if self.chat:
            new, self.said = new[len(self.said) if held else 0 :], new
        more = {"add_special_tokens": False} if self.chat or held else {}
        own = tokenizer(new, return_tensors="pt", **more)["input_ids"][0].long().tolist()
        if self.chat and held and own[:1] == held[-1:]:  # the model ended its turn itself, with what the template ends it by
            own = own[1:]
        found = [*held, *own]
        if not own:
            raise TqaiError(f"the tokenizer of {name} makes no token of this prompt: give another one")
        if max(found) >= self.loaded.embeddings:
            raise TqaiError(f"the tokenizer of {name} has tokens that its model does not: take the two from one place")
        return found

    def _rendered(self) -> str:
        """The conversation as the chat template writes it, up to where the model goes on."""
        try:
            return str(self.loaded.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates are programs: jinja2's errors, and whatever one raises
            raise TqaiError(f"the chat template of {self.loaded.name}: {first_line(error)}; --raw leaves it out") from None

    def _kept(self, ids: list[int]) -> int:
        """How many of ``ids`` the cache holds, once it holds nothing else."""
        held = self.cache.get_seq_length()
        same = next((i for i, (a, b) in enumerate(zip(ids, self.tokens, strict=False)) if a != b), min(len(ids), len(self.tokens)))
        keep = min(same, held, len(ids) - 1)
        if keep < held:
            try:
                self.cache.crop(keep - held)
            except (ValueError, RuntimeError, NotImplementedError, AttributeError):  # a sliding window that has passed, a state space
                self.cache.reset()
                keep = 0
        return keep
