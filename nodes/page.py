"""What a run tells the page, and which node runs. The server is asked for, never imported: tests and scripts have none."""

from __future__ import annotations

import sys
from typing import Any

EVENT = "tqai.step"


def sender(node: str | None) -> Any:
    """Sends a run's state to the page, once a step; nothing where no server runs or the node has no id."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if node is None or instance is None:
        return None
    return lambda state: instance.send_sync(EVENT, {"node": node, **state})


def executing() -> str | None:
    """The node that samples right now."""
    utils = sys.modules.get("comfy_execution.utils")
    context = utils.get_executing_context() if utils is not None else None
    return None if context is None else str(context.node_id)
