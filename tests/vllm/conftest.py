"""Tests in real engines of vLLM: ``make test-vllm``, in .venv-vllm. Scenes run in processes of their own, one at a time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
found = importlib.util.find_spec("vllm")  # this very folder may pass for a package of that name
collect_ignore_glob = [] if found is not None and found.origin else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the engines share."""
    return tmp_path_factory.mktemp("shared")
