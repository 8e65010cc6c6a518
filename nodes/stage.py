"""What the nodes of one stage share: a dynamic combo of its methods, and the pipeline with the one chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from .files import contained
from .pipeline import DEFAULT, Pipeline
from .widgets import CATEGORY, PIPELINE, dropdown, pipeline_input


class StageNode(io.ComfyNode):
    """Base of the nodes Scorer, Strategy and Monitor. ``choices`` stand first in the combo, the default one before all."""

    role: ClassVar[str]
    choices: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    tooltip: ClassVar[str]
    aliases: ClassVar[Sequence[str]]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=f"TQAI{cls.role.title()}",
            display_name=f"TQAI {cls.role.title()}",
            category=CATEGORY,
            description=cls.description,
            search_aliases=list(cls.aliases),
            inputs=[dropdown(cls.role, cls.choices[0], cls.tooltip, cls.choices), pipeline_input()],
            outputs=[PIPELINE.Output(display_name="pipeline", tooltip=f"The pipeline with this {cls.role}.")],
        )

    @classmethod
    def execute(cls, pipeline: Pipeline | None = None, **inputs: dict[str, Any] | None) -> io.NodeOutput:
        return io.NodeOutput(contained((pipeline or DEFAULT).with_stage(cls.role, inputs.get(cls.role))))
