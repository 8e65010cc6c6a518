"""vLLM: prefixes packed below its own offloading (``TqaiTier``), and a KV connector for CPU engines (``TqaiConnector``).

vLLM imports both by this module's name, so nothing of vLLM is imported before one of them is asked for: docs/vllm.md.
"""

from __future__ import annotations

import importlib
from typing import Any

PLACES = {"TqaiTier": ".tier", "TqaiConnector": ".connector"}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .version import check

    check()
    return getattr(importlib.import_module(PLACES[name], __name__), name)
