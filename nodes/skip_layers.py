"""Sets which blocks stay exact."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from tqai_core.config import Config

from .pipeline import DEFAULT, Pipeline
from .widgets import CATEGORY, PIPELINE, pipeline_input, verdict


class TQAISkipLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAISkipLayers",
            display_name="TQAI Skip Layers",
            category=CATEGORY,
            description="Protects parts of a model: the blocks named here are always computed. For levels block and attention of TQAI "
            "Compress. At level model, where whole steps are skipped, it has an effect only when all blocks are named: tqai is off then.",
            search_aliases=["tqai", "protect blocks", "exact layers"],
            inputs=[
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Block numbers, ranges and names, as in 0, 1, 5-8, -1, double_blocks.2. Blocks count from 0 in the order they "
                    "run (Flux: double, then single); -1 is the last one.",
                ),
                pipeline_input(),
            ],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip="The pipeline with these blocks left exact.")],
        )

    @classmethod
    def validate_inputs(cls, layers: str) -> bool | str:
        return verdict(lambda: Config(skip_layers=layers or ""))  # a linked input is None until it runs

    @classmethod
    def execute(cls, layers: str, pipeline: Pipeline | None = None) -> io.NodeOutput:
        return io.NodeOutput(dataclasses.replace(pipeline or DEFAULT, skip_layers=Config(skip_layers=layers).skip_layers))
