"""A language model and its tokenizer for ``tqai run``: the mini, a folder or hub id, or a GGUF file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ...errors import TqaiError
from ...text import first_line
from . import minis as mini

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of the class names that write text


class Bytes:
    """The mini's tokenizer: a token is a byte."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([list(text.encode())])}

    def decode(self, tokens: Any, **options: Any) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", "replace")


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    name: str

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for, where its configuration says so."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def embeddings(self) -> int:
        return self.model.get_input_embeddings().num_embeddings


def load(args: argparse.Namespace, device: torch.device) -> Loaded:
    """Model and tokenizer. TqaiError in one line for what is no causal LM, or cannot be loaded."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.demo:
        return Loaded(mini.model().to(device, None if dtype == "auto" else dtype), Bytes(), "demo")
    name, options = _place(args.model)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        about = AutoConfig.from_pretrained(name, **options)
        classes = getattr(about, "architectures", None) or []
        if getattr(about, "is_encoder_decoder", False) or (classes and not any(c.endswith(CAUSAL) for c in classes)):
            kind = ", ".join(classes) or about.model_type
            raise TqaiError(f"{name} is no causal language model ({kind}): give one that AutoModelForCausalLM loads")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except TqaiError:
        raise
    except ImportError as error:
        raise TqaiError(f"{name}: {first_line(error)}: install what it names") from None
    except Exception as error:  # whatever the loading code meets in a broken folder
        cure = "give a folder or hub id with config.json, weights and tokenizer files that AutoModelForCausalLM loads"
        cure = "give a GGUF file of an architecture that transformers reads (Llama, Qwen, Gemma, ...)" if options else cure
        raise TqaiError(f"cannot load {args.model}: {first_line(error)}; {cure}") from None
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model.generation_config, "cache_implementation", None):
        model.generation_config.cache_implementation = None  # each run brings its own cache
    return Loaded(model.eval().requires_grad_(False).to(device), tokenizer, name)


def _place(given: str) -> tuple[str, dict[str, Any]]:
    """Name or folder for ``from_pretrained``, and the GGUF file in it, if that is what to load."""
    path = Path(given).expanduser()
    if path.is_dir():
        found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise TqaiError(f"{given} has {len(found)} GGUF files: give one of them, as in -m {found[0]}")
        path = found[0] if found else path
    if path.suffix.lower() != ".gguf":
        return str(path) if path.is_dir() else given, {}
    if util.find_spec("gguf") is None:
        raise TqaiError(f"{path.name} is a GGUF file, and the package that reads it is missing: pip install 'tqai-core[gguf]'")
    return str(path.parent), {"gguf_file": path.name}
