"""The trained minis as models of the fake ComfyUI: diffusers' own layers, run block by block as ComfyUI runs its models.

Each block goes through ``patches_replace`` and each attention through ``optimized_attention``, with the layout of tokens that
ComfyUI's class of that family hands over. So a run here and a run of the diffusers pipeline compute the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import comfy_fake
import torch
from torch import Tensor, nn

from tqai_core.hosts.diffusers.minis import pixels, prompts, transformer


class Block(nn.Module):
    """A block of diffusers behind ComfyUI's block interface: a dict of ``img`` and ``txt`` in, the same out."""

    def __init__(self, inner: nn.Module, owner: Mini, kind: str, number: int) -> None:
        super().__init__()
        self.inner, self.kind, self.number = inner, kind, number
        self._owner = [owner]  # in a list: torch would register the owner as a child

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *rest: Any, **kw: Any) -> Any:
        options, wan = self._owner[0].options, bool(rest)
        joined = self.kind == "single_block"  # Flux's single blocks see text and image as one sequence
        text = encoder_hidden_states.shape[1]

        def run(args: dict[str, Any]) -> dict[str, Any]:
            img, txt = args["img"], args.get("txt")
            if joined:
                txt, img = img[:, :text], img[:, text:]
            out = self.inner(img, txt, *rest, **kw)
            if wan:
                return {"img": out}
            return {"img": torch.cat(out, dim=1)} if joined else {"img": out[1], "txt": out[0]}

        args: dict[str, Any] = {"img": hidden_states, "txt": encoder_hidden_states, "transformer_options": options}
        if joined:
            args = {"img": torch.cat([encoder_hidden_states, hidden_states], dim=1), "transformer_options": options}
        replace = options.get("patches_replace", {}).get("dit", {}).get((self.kind, self.number))
        out = run(args) if replace is None else replace(args, {"original_block": run})
        if joined:
            return out["img"][:, :text], out["img"][:, text:]
        return out["img"] if wan else (out["txt"], out["img"])


class Mini(comfy_fake.Transformer):
    """``kind`` is the mini's family; the latents are its pixels ``[n, 1, (9,) 16, 16]``."""

    kind = ""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.net = transformer(self.kind)
        self.options: dict[str, Any] = {}
        theirs = ("transformer_blocks", "single_transformer_blocks") if self.kind != "wan" else ("blocks",)
        for name, inner in zip(self.lists, theirs, strict=False):
            kind = "single_block" if name == "single_blocks" else "double_block"
            blocks = nn.ModuleList(Block(block, self, kind, i) for i, block in enumerate(getattr(self.net, inner)))
            setattr(self, name, blocks)
            setattr(self.net, inner, blocks)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        text, pooled = context[:, :-1], context[:, -1]
        kw: dict[str, Any] = dict(encoder_hidden_states=text, timestep=t if self.kind == "flux" else t * 1000, return_dict=False)
        if self.kind != "wan":
            kw["pooled_projections"] = pooled
        if self.kind == "flux":
            n = len(x)
            x = x.view(n, 1, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, 64, 4)
            ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
            kw |= dict(img_ids=ids, txt_ids=torch.zeros(text.shape[1], 3))
        self.options, self.text = transformer_options, text.shape[1]
        with self._attention():
            return pixels(self.kind, self.net(hidden_states=x, **kw)[0])

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """torch's attention leads to the host's, as ComfyUI's models call it: Flux with heads, SD3 and WAN with tokens."""
        real = nn.functional.scaled_dot_product_attention
        inside: list[bool] = []

        def call(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
            if inside:  # the host's own attention, or tqai's, at work
                return real(query, key, value, *args, **kw)
            heads, headed = query.shape[1], self.kind == "flux"
            qkv = (query, key, value) if headed else [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
            text = self.text if self.kind == "sd3" else 0  # ComfyUI's SD3 puts the text first, diffusers' last
            inside.append(True)
            try:
                out = comfy_fake.optimized_attention(
                    *(t.roll(text, 1) if text else t for t in qkv), heads, mask=None, skip_reshape=headed, transformer_options=self.options
                )
            finally:
                inside.pop()
            return out.roll(-text, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

        with mock.patch.object(nn.functional, "scaled_dot_product_attention", call):
            yield


# below the fake's own classes, so that the family is found as theirs is
CLASSES = {
    kind: type(f"Mini{base.__name__}", (Mini, base), {"kind": kind, "lists": base.lists})
    for kind, base in (("flux", comfy_fake.Flux), ("sd3", comfy_fake.MMDiT), ("wan", comfy_fake.WanModel))
}


def load(kind: str) -> comfy_fake.ModelPatcher:
    model = comfy_fake.BaseModel.__new__(comfy_fake.BaseModel)
    nn.Module.__init__(model)
    model.name, model.diffusion_model, model.model_sampling = f"mini_{kind}", CLASSES[kind](), comfy_fake.Flow(1.0)
    return comfy_fake.ModelPatcher(model)


def conds(kind: str, labels: list[int]) -> list[Any]:
    """Text ``[n, 4, 64]`` with the pooled vector as one more row, which the fake host hands on as its text."""
    text, pooled = prompts(kind, labels)
    return [[torch.cat([text, pooled[:, None]], dim=1), {}]]
