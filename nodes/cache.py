"""Packs what other nodes keep from step to step."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .cache_patch import patch_caches
from .cache_run import CacheSettings
from .widgets import CATEGORY

BITS = ["8", "6", "5", "4", "3", "2"]


class TQAICache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAICache",
            display_name="TQAI Cache",
            category=CATEGORY,
            description="Makes the memory of a cache node smaller: what Flux KV Cache (reference pictures of FLUX.2 Klein), "
            "WanAnimate2Cache or QwenImage21Cache keeps from step to step is stored in few bits. Put it before or after that node, with or "
            "without TQAI Compress. TQAI Report shows the memory and the error.",
            search_aliases=[
                "tqai",
                "kv cache",
                "cache",
                "memory",
                "vram",
                "quantize",
                "flux kv cache",
                "klein",
                "animate",
                "qwen image 2.1",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model with a cache node before or after this one."),
                io.Combo.Input(
                    "bits_keys",
                    options=BITS,
                    default="6",
                    tooltip="Bits for each number of the keys, by which attention finds what to look at. More bits: closer to the exact "
                    "picture. WanAnimate2Cache keeps no keys.",
                ),
                io.Combo.Input(
                    "bits_values",
                    options=BITS,
                    default="4",
                    tooltip="Bits for each number of the values, which attention reads, and of what WanAnimate2Cache keeps. Uncompressed "
                    "it is 16.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    tooltip="On: the packed cache waits in the computer's memory and visits the graphics card layer by layer. Off: it "
                    "stays where the cache node puts it.",
                ),
                io.Int.Input(
                    "memory_budget",
                    default=32768,
                    min=0,
                    max=1_048_576,
                    tooltip="MB that the packed cache may take. Above it, it moves to the computer's memory; where that is not possible, "
                    "nothing is kept and each step computes it again.",
                    advanced=True,
                ),
                io.Boolean.Input("enabled", default=True, tooltip="Off: the model passes through untouched, its cache stays as it is."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model whose cache is packed.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, bits_keys: str, bits_values: str, offload: bool, memory_budget: int, enabled: bool
    ) -> io.NodeOutput:  # fmt: skip
        if not enabled:
            return io.NodeOutput(model)
        settings = CacheSettings(int(bits_keys), int(bits_values), offload, memory_budget * 2**20, cls.hidden.unique_id)
        return io.NodeOutput(patch_caches(model, settings))
