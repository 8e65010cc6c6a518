"""Shows what happened."""

from __future__ import annotations

import json
import time
from typing import Any

from comfy_api.latest import io, ui

from tqai_core.report import Report

from .chart import draw
from .run_history import HISTORY, Entry, upstream
from .widgets import CATEGORY


class TQAIReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAIReport",
            display_name="TQAI Report",
            category=CATEGORY,
            description="Shows what the TQAI Compress nodes before it did: steps computed and forecast, measured forecast error, bytes "
            "held, and why something was computed exactly.",
            search_aliases=["tqai", "statistics", "speed", "chart"],
            is_output_node=True,
            inputs=[io.Latent.Input("samples", tooltip="Link the sampler's latent, so that this runs after it. It passes through.")],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The latent, unchanged."),
                io.String.Output(display_name="text", tooltip="The report as Markdown."),
                io.Image.Output(display_name="chart", tooltip="Decision, forecast error and bytes held, step by step."),
                io.String.Output(display_name="json", tooltip="The same figures as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """Always run: the sampler before it may have, while the graph stayed the same."""
        return time.time()

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        before = upstream(cls.hidden.prompt, cls.hidden.unique_id)
        # another workflow of this session may have used the same ids for other nodes
        entries = [e for e in HISTORY.of(before) if e.patch in upstream(cls.hidden.prompt, e.sampler)] if before else HISTORY.last()
        text, chart = _text(entries), draw(entries)
        data = json.dumps([{"node": e.patch, "sampler": e.sampler, "model": e.family, "done": e.done, **e.report} for e in entries])
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(chart, cls=cls).as_dict()}
        return io.NodeOutput(samples, text, chart, data, ui=shown)


def _text(entries: list[Entry]) -> str:
    if not entries:
        return "No sampling with TQAI Compress has run before this node: it is off, not linked, or nothing was sampled since the start."
    return "\n".join(f"### {e.head}{'' if e.done else ' (stopped before its end)'}\n\n{Report(**e.report).to_markdown()}" for e in entries)
