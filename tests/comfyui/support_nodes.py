"""Custom nodes for the server test alone: stand-ins for text encoders and decoders, which nobody has at hand."""

import os

import folder_paths
import torch
from comfy.latent_formats import Flux
from comfy_api.latest import io
from safetensors.torch import load_file


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


class TestDigits(io.ComfyNode):
    """Prompts of a trained mini, from a file that the test put into the input folder: one digit a batch element."""

    @classmethod
    def define_schema(cls):
        inputs = [io.String.Input("prompt"), io.String.Input("file")]
        return io.Schema(node_id="TestDigits", category="test", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, prompt, file):
        held = load_file(os.path.join(folder_paths.get_input_directory(), file))
        labels = [int(c) for c in prompt if c.isdigit()] or [10] * 5
        return io.NodeOutput([[held["text"][labels], {"pooled_output": held["pooled"][labels]}]])


class TestPixels(io.ComfyNode):
    """The Flux mini's latents are pixels: the first channel, enlarged, the batch side by side."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestPixels", category="test", inputs=[io.Latent.Input("samples")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples):
        x = Flux().process_in(samples["samples"])[:, :1].add(1).div(2).clamp(0, 1)
        x = torch.cat(list(x.repeat_interleave(8, 2).repeat_interleave(8, 3)), 2)
        return io.NodeOutput(x[..., None].expand(-1, -1, -1, 3))


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning, "TestLatent": TestLatent, "TestDigits": TestDigits, "TestPixels": TestPixels}
