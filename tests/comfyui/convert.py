"""The trained minis under ComfyUI's key names, so that its own loaders and samplers draw their digits.

ComfyUI fixes 16 latent channels (Flux, SD3, WAN) and 4096 text features (SD3 and WAN). The minis have one channel and
64 features; both are padded with zeros: the padding reads nothing and adds nothing, its velocity is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tqai_core import minis

CHANNELS, TEXT, POOLED = 16, 4096, 2048
TEXT_OF = {"flux": 64, "sd3": TEXT, "wan": TEXT}
POOLED_OF = {"flux": 64, "sd3": POOLED, "wan": 0}
PATCH = 4  # 2 x 2 pixels
EMBED = {"timestep_embedder.linear_1": 0, "timestep_embedder.linear_2": 1, "text_embedder.linear_1": 0, "text_embedder.linear_2": 1}


def convert(kind: str) -> dict[str, Tensor]:
    """State dict that ComfyUI detects as Flux (schnell's kind), SD3 or WAN 2.1 T2V."""
    weights = {k.removeprefix("transformer."): v.float() for k, v in _file(kind).items() if k.startswith("transformer.")}
    return {key: value.contiguous() for key, value in {"flux": _flux, "sd3": _sd3, "wan": _wan}[kind](weights)}


def conditioning(kind: str, labels: list[int]) -> tuple[Tensor, Tensor | None]:
    """Text ``[n, 4, width]`` and pooled ``[n, width]`` for ComfyUI; label 10 is the empty prompt."""
    weights = _file(kind)
    tokens, pooled = weights["tokens"][labels].float(), weights["pooled"][labels].float()
    tokens = _pad(tokens, -1, TEXT_OF[kind])
    return tokens, _pad(pooled, -1, POOLED_OF[kind]) if POOLED_OF[kind] else None


def write(folder: Path) -> None:
    for kind in minis.KINDS:
        save_file(convert(kind), str(folder / f"mini_{kind}.safetensors"))


def _file(kind: str) -> dict[str, Tensor]:
    return load_file(str(Path(minis.__file__).with_name(f"{kind}.safetensors")))


def _flux(w: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for end in ("weight", "bias"):
        yield f"txt_in.{end}", w[f"context_embedder.{end}"]
        yield f"final_layer.adaLN_modulation.1.{end}", _swap(w[f"norm_out.linear.{end}"])
        yield f"final_layer.linear.{end}", _pad(w[f"proj_out.{end}"], 0, CHANNELS * PATCH)
        for name, part in EMBED.items():
            to = ("time_in" if name.startswith("time") else "vector_in") + (".in_layer", ".out_layer")[part]
            yield f"{to}.{end}", w[f"time_text_embed.{name}.{end}"]
    yield "img_in.weight", _pad(w["x_embedder.weight"], 1, CHANNELS * PATCH)
    yield "img_in.bias", w["x_embedder.bias"]
    for i in _count(w, "transformer_blocks"):
        a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, norm, q, out, ff in (
            ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            for end in ("weight", "bias"):
                yield f"{b}.{side}_mod.lin.{end}", w[f"{a}.{norm}.linear.{end}"]
                yield f"{b}.{side}_attn.qkv.{end}", torch.cat([w[f"{a}.attn.{x}.{end}"] for x in q])
                yield f"{b}.{side}_attn.proj.{end}", w[f"{a}.attn.{out}.{end}"]
                yield f"{b}.{side}_mlp.0.{end}", w[f"{a}.{ff}.net.0.proj.{end}"]
                yield f"{b}.{side}_mlp.2.{end}", w[f"{a}.{ff}.net.2.{end}"]
            added = "added_" if side == "txt" else ""
            yield f"{b}.{side}_attn.norm.query_norm.scale", w[f"{a}.attn.norm_{added}q.weight"]
            yield f"{b}.{side}_attn.norm.key_norm.scale", w[f"{a}.attn.norm_{added}k.weight"]
    for i in _count(w, "single_transformer_blocks"):
        a, b = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for end in ("weight", "bias"):
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            yield f"{b}.linear1.{end}", torch.cat([w[f"{a}.{x}.{end}"] for x in parts])
            yield f"{b}.linear2.{end}", w[f"{a}.proj_out.{end}"]
            yield f"{b}.modulation.lin.{end}", w[f"{a}.norm.linear.{end}"]
        yield f"{b}.norm.query_norm.scale", w[f"{a}.attn.norm_q.weight"]
        yield f"{b}.norm.key_norm.scale", w[f"{a}.attn.norm_k.weight"]


def _sd3(w: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "pos_embed", w["pos_embed.pos_embed"]
    yield "x_embedder.proj.weight", _pad(w["pos_embed.proj.weight"], 1, CHANNELS)
    yield "x_embedder.proj.bias", w["pos_embed.proj.bias"]
    yield "context_embedder.weight", _pad(w["context_embedder.weight"], 1, TEXT)
    yield "context_embedder.bias", w["context_embedder.bias"]
    blocks = _count(w, "transformer_blocks")
    for end in ("weight", "bias"):
        for name, part in EMBED.items():
            value = w[f"time_text_embed.{name}.{end}"]
            if name == "text_embedder.linear_1" and end == "weight":
                value = _pad(value, 1, POOLED)
            yield f"{'t' if name.startswith('time') else 'y'}_embedder.mlp.{2 * part}.{end}", value
        yield f"final_layer.adaLN_modulation.1.{end}", _swap(w[f"norm_out.linear.{end}"])
        # SD3's rows run pixel first, channel last
        out = w[f"proj_out.{end}"]
        yield f"final_layer.linear.{end}", _pad(out.view(PATCH, 1, *out.shape[1:]), 1, CHANNELS).flatten(0, 1)
    for i in blocks:
        a = f"transformer_blocks.{i}"
        last = i == len(blocks) - 1
        for side, norm, q, out, ff in (
            ("x", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("context", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            b = f"joint_blocks.{i}.{side}_block"
            final = last and side == "context"  # keys and values only
            added = "added_" if side == "context" else ""
            for end in ("weight", "bias"):
                modulation = w[f"{a}.{norm}.linear.{end}"]
                yield f"{b}.adaLN_modulation.1.{end}", _swap(modulation) if final else modulation
                yield f"{b}.attn.qkv.{end}", torch.cat([w[f"{a}.attn.{x}.{end}"] for x in q])
                if not final:
                    yield f"{b}.attn.proj.{end}", w[f"{a}.attn.{out}.{end}"]
                    yield f"{b}.mlp.fc1.{end}", w[f"{a}.{ff}.net.0.proj.{end}"]
                    yield f"{b}.mlp.fc2.{end}", w[f"{a}.{ff}.net.2.{end}"]
            yield f"{b}.attn.ln_q.weight", w[f"{a}.attn.norm_{added}q.weight"]
            yield f"{b}.attn.ln_k.weight", w[f"{a}.attn.norm_{added}k.weight"]


def _wan(w: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "patch_embedding.weight", _pad(w["patch_embedding.weight"], 1, CHANNELS)
    yield "patch_embedding.bias", w["patch_embedding.bias"]
    yield "head.modulation", w["scale_shift_table"]
    for end in ("weight", "bias"):
        for part in (1, 2):
            text = w[f"condition_embedder.text_embedder.linear_{part}.{end}"]
            yield f"text_embedding.{2 * part - 2}.{end}", _pad(text, 1, TEXT) if part == 1 and end == "weight" else text
            yield f"time_embedding.{2 * part - 2}.{end}", w[f"condition_embedder.time_embedder.linear_{part}.{end}"]
        yield f"time_projection.1.{end}", w[f"condition_embedder.time_proj.{end}"]
        out = w[f"proj_out.{end}"]
        yield f"head.head.{end}", _pad(out.view(PATCH, 1, *out.shape[1:]), 1, CHANNELS).flatten(0, 1)
    for i in _count(w, "blocks"):
        a = f"blocks.{i}"
        for mine, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for end in ("weight", "bias"):
                for x, y in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                    yield f"{a}.{mine}.{x}.{end}", w[f"{a}.{theirs}.{y}.{end}"]
            for x in ("q", "k"):
                yield f"{a}.{mine}.norm_{x}.weight", w[f"{a}.{theirs}.norm_{x}.weight"]
        for end in ("weight", "bias"):
            yield f"{a}.ffn.0.{end}", w[f"{a}.ffn.net.0.proj.{end}"]
            yield f"{a}.ffn.2.{end}", w[f"{a}.ffn.net.2.{end}"]
            yield f"{a}.norm3.{end}", w[f"{a}.norm2.{end}"]
        yield f"{a}.modulation", w[f"{a}.scale_shift_table"]


def _count(w: dict[str, Tensor], name: str) -> range:
    return range(1 + max(int(k.split(".")[1]) for k in w if k.startswith(f"{name}.")))


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _swap(x: Tensor) -> Tensor:
    """diffusers puts scale before shift, the original models shift before scale."""
    first, second = x.chunk(2)
    return torch.cat([second, first])
