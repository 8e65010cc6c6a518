"""Files changed at random: 2,000 of `make fuzz`'s 50,000."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("optuna")


def test_2000_changed_files_are_refused_in_a_sentence_or_read_right(root):
    """A process of its own: its peak of memory is that of the readers."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "2000", "7"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
