"""Sets what says which steps matter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .files import table
from .pipeline import DEFAULT, Pipeline
from .widgets import CATEGORY, NONE, PIPELINE, dropdown, pipeline_input


class TQAIScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAIScorer",
            display_name="TQAI Scorer",
            category=CATEGORY,
            description="Sets the scorer of a tqai pipeline: it says how much a step matters, and the monitor allows less error there.",
            search_aliases=["tqai", "importance", "snr", "cache"],
            inputs=[
                dropdown("scorer", "none", "What says how much a step, token or head matters.", (NONE,)),
                pipeline_input(),
            ],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip="The pipeline with this scorer.")],
        )

    @classmethod
    def execute(cls, scorer: dict[str, Any] | None = None, pipeline: Pipeline | None = None) -> io.NodeOutput:
        if scorer and scorer.get("file"):
            scorer = {**scorer, "file": table(scorer["file"])}
        return io.NodeOutput((pipeline or DEFAULT).with_stage("scorer", scorer))
