"""Reads a pipeline from a JSON file."""

from __future__ import annotations

from comfy_api.latest import io

from . import files
from .pipeline import Pipeline
from .widgets import CATEGORY, EMPTY, PIPELINE, verdict


class TQAILoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        found = files.listing()
        return io.Schema(
            node_id="TQAILoadPipeline",
            display_name="TQAI Load Pipeline",
            category=CATEGORY,
            description="Loads settings that TQAI Save Pipeline wrote, also those of somebody else: put the JSON file into ComfyUI's "
            "input folder.",
            search_aliases=["tqai", "import", "share", "json"],
            inputs=[io.Combo.Input("file", options=found or [EMPTY], tooltip="Files in output/tqai and in the input folder.")],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip="The pipeline of the file.")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Instead of the built-in check, which knows only the files that were there when the page was loaded."""
        return verdict(lambda: files.contained(Pipeline.from_json(files.read(file))))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.read(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(files.contained(Pipeline.from_json(files.read(file))))
