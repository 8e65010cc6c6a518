"""Opening a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...errors import TqaiError
from ...files import read_json
from ...text import first_line
from .clock import denoisers


def pipeline(name: str | Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A pipeline by folder or name. ValueError in one line for whatever the loading code meets.

    Parts that a folder's index leaves empty (an SD3 without T5) are told to diffusers, which takes their absence for an error.
    """
    index = Path(name).expanduser() / "model_index.json"
    try:
        parts = read_json(index, what="pipeline", again="download it again") if index.is_file() else {}
        absent = {part: None for part, kind in parts.items() if kind == [None, None]}
        pipe = DiffusionPipeline.from_pretrained(str(index.parent if parts else name), dtype=dtype, **absent, **options)
    except Exception as error:
        cure = "give a folder or name that DiffusionPipeline.from_pretrained loads"
        raise TqaiError(f"cannot load {name}: {first_line(error)}; {cure}") from None
    if not denoisers(pipe):
        raise TqaiError(f"{type(pipe).__name__} has no transformer and no unet: give a pipeline that denoises in steps")
    return pipe


def pipeline_code(name: str, pipe: Any) -> str:
    """The line of a script that opens ``pipe`` again, and where it goes."""
    dtype, device = next(iter(denoisers(pipe).values())).dtype, pipe.device.type
    return f'pipe = DiffusionPipeline.from_pretrained({name!r}, torch_dtype={dtype}).to("{device}")'
