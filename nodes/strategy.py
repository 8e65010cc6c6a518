"""Sets how a step is forecast."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .pipeline import DEFAULT, Pipeline
from .widgets import CATEGORY, PIPELINE, dropdown, pipeline_input


class TQAIStrategy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAIStrategy",
            display_name="TQAI Strategy",
            category=CATEGORY,
            description="Sets the strategy of a tqai pipeline: how the model's output at a step is forecast from the steps "
            "before it, and what is kept for that.",
            search_aliases=["tqai", "forecast", "taylorseer", "step skip", "cache"],
            inputs=[
                dropdown("strategy", "delta2", "How a step is forecast from the steps before it."),
                pipeline_input(),
            ],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip="The pipeline with this strategy.")],
        )

    @classmethod
    def execute(cls, strategy: dict[str, Any] | None = None, pipeline: Pipeline | None = None) -> io.NodeOutput:
        return io.NodeOutput((pipeline or DEFAULT).with_stage("strategy", strategy))
