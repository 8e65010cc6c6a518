"""Patches a model with a pipeline."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from tqai_core.config import FEW, HALF, LEVELS, PRESETS
from tqai_core.config import preset as ready

from .files import contained
from .patch import Settings, kind_of, patch
from .pipeline import Pipeline
from .widgets import CATEGORY, dropdown, pipeline_input

KEEP = "from pipeline"
ALIASES = ["tqai", "speed up", "step skip", "cache", "teacache", "easycache", "magcache", "wavespeed"]
ALIASES += ["flux", "sd3", "wan", "qwen", "z-image", "ltx", "hunyuan", "minimax"]
MODEL_LEVELS = [level for level in LEVELS if level != "kv"]  # kv is for language models


class TQAICompress(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAICompress",
            display_name="TQAI Compress",
            category=CATEGORY,
            description="Makes sampling faster: a step that can be forecast from the steps before it is skipped, as long as the measured "
            "error stays small. For MiniMax-H3, LTX, Qwen-Image, WAN, Z-Image, Krea 2, Flux, SD3, HunyuanVideo, Chroma and all other "
            "flow-matching models. Put it last before the sampler; WAN 2.2 A14B takes one for each of its two models. SD1.5 and SDXL are "
            "left as they are, and TQAI Report says why.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model, after LoRAs and shift nodes."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, FEW, HALF],
                    default="balanced",
                    tooltip="How much is skipped: quality least, fast most. few is for 4 to 8 steps: every second one from the fourth on. "
                    "half: balanced, and the first steps at half the height and width. The error allowed is tuned for each family of "
                    "models. Not used when a pipeline is linked.",
                ),
                io.Combo.Input(
                    "level",
                    options=MODEL_LEVELS,
                    default="model",
                    tooltip="What is skipped. model: a whole step, which saves most. block: parts of a step, one by one. attention: the "
                    "attentions of a step alone; strategy window needs it. Where a model allows only model, an error says so.",
                ),
                dropdown("codec", KEEP, "How the results of steps are stored until the next ones, and with how many bits.", ()),
                io.Int.Input(
                    "memory_budget",
                    default=512,
                    min=0,
                    max=1_048_576,
                    tooltip="MB that may be kept between steps. Above it, results move to the computer's memory; where that is not "
                    "possible, the remaining steps are computed.",
                    advanced=True,
                ),
                io.Boolean.Input("enabled", default=True, tooltip="Off: the model passes through untouched."),
                pipeline_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, preset: str, level: str, memory_budget: int, enabled: bool, codec: dict[str, Any] | None = None,
        pipeline: Pipeline | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if not enabled:
            return io.NodeOutput(model)
        family = kind_of(model).family
        stages = pipeline or Pipeline.of(ready(preset, family.name if family else None))
        if codec is None or codec["codec"] != KEEP:
            stages = stages.with_stage("codec", codec)
        settings = Settings(contained(stages).config(level), cls.hidden.unique_id, memory_budget * 2**20)
        return io.NodeOutput(patch(model, settings))
