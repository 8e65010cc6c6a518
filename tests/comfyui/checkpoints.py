"""Tiny random checkpoints that an unmodified ComfyUI detects, and the trained minis under its key names.

    python tests/comfyui/checkpoints.py COMFYUI_FOLDER OUT_FOLDER

Names and shapes come from ComfyUI's own modules, so they follow its loaders.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]


def fill(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Seeded weights of unit gain, so that outputs are finite and attention is not uniform."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=g)
        if value.ndim == 0:
            weights[key] = torch.zeros(())
        elif value.ndim == 1:
            norm = not key.endswith("bias") and any(part in key for part in ("norm", "ln_q", "ln_k", "scale"))
            weights[key] = 0.02 * noise + float(norm)
        else:
            fan_in = value.shape[-1] if "modulation" in key and value.ndim > 2 else math.prod(value.shape[1:])
            weights[key] = noise / math.sqrt(max(fan_in, 1))
    return weights


def models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Name -> builder and seed. ComfyUI must be importable."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ldm.wan.model import WanModel

    base: dict[str, Any] = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)

    def flux() -> nn.Module:
        known = {f.name for f in dataclasses.fields(FluxParams)}
        extra: dict[str, Any] = {"txt_ids_dims": []} if "txt_ids_dims" in known else {}
        return Flux(
            image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=128,
            mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
            guidance_embed=True, **extra, **base,
        )  # fmt: skip

    def sd3(depth: int, second: tuple[int, ...] = ()) -> nn.Module:
        width = 64 * depth  # detection reads depth and heads off the width
        return OpenAISignatureMMDITWrapper(
            input_size=None, patch_size=2, in_channels=16, depth=depth, adm_in_channels=2048, qk_norm="rms", num_patches=64 * 64,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}},
            pos_embed_max_size=64, pos_embed_scaling_factor=None, x_block_self_attn_layers=list(second), **base,
        )  # fmt: skip

    def wan(channels: int, out: int) -> nn.Module:
        return WanModel(
            model_type="t2v", patch_size=(1, 2, 2), in_dim=channels, dim=256, ffn_dim=512, freq_dim=256, text_dim=4096, out_dim=out,
            num_heads=2, num_layers=2, cross_attn_norm=True, qk_norm=True, eps=1e-6, **base,
        )  # fmt: skip

    return {
        "flux": (flux, 7),
        "sd3": (lambda: sd3(2), 1),
        "sd35m": (lambda: sd3(3, (0, 1)), 2),  # SD3.5-medium: a second self-attention in its first blocks
        "wan22_5b": (lambda: wan(48, 48), 3),
        "wan_14b_high": (lambda: wan(16, 16), 4),
        "wan_14b_low": (lambda: wan(16, 16), 5),
        "wan_14b_i2v": (lambda: wan(36, 16), 6),
    }


def write(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, (build, seed) in models().items():
        path = out / f"tiny_{name}.safetensors"
        if not path.exists():
            save_file(fill(build(), seed), str(path))
    if not all((out / f"mini_{kind}.safetensors").exists() for kind in ("flux", "sd3", "wan")):
        sys.path.append(str(ROOT))
        sys.path.insert(0, str(Path(__file__).parent))
        import convert

        convert.write(out)


if __name__ == "__main__":
    comfy, out = sys.argv[1:3]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, comfy)
    import comfy.options

    comfy.options.enable_args_parsing()
    write(Path(out))
