"""Writes a pipeline to a JSON file."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import files
from .pipeline import Pipeline
from .widgets import CATEGORY, PIPELINE, pipeline_input


class TQAISavePipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAISavePipeline",
            display_name="TQAI Save Pipeline",
            category=CATEGORY,
            description="Saves the settings of the linked tqai nodes as a file, to use them again or to share them: "
            "output/tqai/<name>.json. Python reads the same file (tqai.Config.from_json).",
            search_aliases=["tqai", "export", "share", "json"],
            is_output_node=True,
            inputs=[
                pipeline_input(optional=False),
                io.String.Input(
                    "name", default="pipeline", tooltip="File name under output/tqai, without .json; an older one is replaced."
                ),
            ],
            outputs=[
                PIPELINE.Output(display_name="pipeline", tooltip="The pipeline, unchanged."),
                io.String.Output(display_name="json", tooltip="What was written."),
            ],
        )

    @classmethod
    def execute(cls, pipeline: Pipeline, name: str) -> io.NodeOutput:
        text = pipeline.to_json()
        path = files.write(name, text)
        return io.NodeOutput(pipeline, text, ui=ui.PreviewText(f"{path.name}\n{text}"))
