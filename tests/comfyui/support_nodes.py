"""Custom nodes for the server test alone: random conditioning in place of text encoders, which nobody has at hand."""

import torch
from comfy_api.latest import io


class TestConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        numbers = [io.Int.Input(name, default=0, max=1 << 30) for name in ("seed", "width", "pooled")]
        return io.Schema(node_id="TestConditioning", category="test", inputs=numbers, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, seed, width, pooled):
        g = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {}
        return io.NodeOutput([[torch.randn(1, 8, width, generator=g), extra]])


class TestLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestLatent", category="test", inputs=[io.String.Input("shape")], outputs=[io.Latent.Output()]
        )  # fmt: skip

    @classmethod
    def execute(cls, shape):
        return io.NodeOutput({"samples": torch.zeros([int(n) for n in shape.split(",")])})


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning, "TestLatent": TestLatent}
