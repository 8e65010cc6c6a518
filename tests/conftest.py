"""Make ``tqai_core`` importable from a bare checkout, last on the path: our ``nodes`` must never win over ComfyUI's."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("tqai_core") is None:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)
COUNT = {"flux": 2, "sd3": 2, "wan": 1}


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def _pipes() -> dict[str, Any]:
    from tqai_core import minis

    return {kind: minis.pipeline(kind) for kind in minis.KINDS}


@pytest.fixture
def pipe_of(_pipes: dict[str, Any]) -> Callable[..., Any]:
    """The mini pipeline of a kind with a fresh scheduler. Shared: a test that patches it must undo."""
    from tqai_core.adapters.solvers import scheduler

    def give(kind: str, name: str = "euler", shift: float = 1.0) -> Any:
        pipe = _pipes[kind]
        assert "forward" not in vars(pipe.transformer), "an earlier test left its patch behind"
        pipe.scheduler = scheduler(name, shift, kind)
        return pipe

    return give


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Latents of a few digits from a pipeline; the same noise for the same seed."""
    from tqai_core import minis

    def go(pipe: Any, kind: str, steps: int = 24, seed: int = 0, guidance: float = 2.0, **over: Any) -> torch.Tensor:
        kw = {**minis.inputs(kind, list(range(COUNT[kind])), guidance), **over}
        generator = torch.Generator().manual_seed(seed)
        return pipe(**kw, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)[0]

    return go
