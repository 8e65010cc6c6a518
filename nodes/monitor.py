"""Sets what decides which steps are forecast."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .pipeline import DEFAULT, Pipeline
from .widgets import CATEGORY, PIPELINE, dropdown, pipeline_input


class TQAIMonitor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAIMonitor",
            display_name="TQAI Monitor",
            category=CATEGORY,
            description="Sets the monitor of a tqai pipeline: it compares forecasts with computed steps and decides which "
            "steps may be forecast. Its tolerance is the dial between speed and likeness.",
            search_aliases=["tqai", "tolerance", "step skip", "teacache", "easycache", "magcache"],
            inputs=[
                dropdown("monitor", "lyapunov", "What decides which steps are computed and which are forecast."),
                pipeline_input(),
            ],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip="The pipeline with this monitor.")],
        )

    @classmethod
    def execute(cls, monitor: dict[str, Any] | None = None, pipeline: Pipeline | None = None) -> io.NodeOutput:
        return io.NodeOutput((pipeline or DEFAULT).with_stage("monitor", monitor))
