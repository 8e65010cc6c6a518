"""Train the mini diffusion transformers of tqai: diffusers' own classes, scikit-learn's digits, photographs that packages ship.

    python benchmarks/minis/train_dit.py {flux,sd3,wan,wan_sizes,z_image,photo} [--steps N] [--seed S] [--out DIR]

Rectified flow: x_sigma = (1 - sigma) x + sigma noise, the net predicts noise - x (Liu et al. 2209.03003; sigma is
logit-normal as in SD3, Esser et al. 2403.03206). A class label becomes four learned "text" tokens and a pooled vector;
the last class is the empty prompt, so that classifier-free guidance works. Writes fp16 safetensors (EMA weights, config in
the header) and a JSON log of loss and sample accuracy. Shapes are those ComfyUI's loaders detect: Flux and Wan with
one head of 128, SD3 with width = 64 x depth. Z-Image counts time from noise to image (1 - sigma), predicts x - noise, and
takes and gives a list of one tensor a sample: its pipeline turns time and sign, and so does :class:`Conditioned`.
The photo mini sees every crop at 32 x 32 or at 16 x 16 pixels, which is the area mean of the former under the same prompt
(photographs.py): its small picture is the coarse form of
its large one. It was trained by four processes (``WORLD_SIZE=4``, ``RANK=0`` to 3, ``MASTER_ADDR``). ``wan_sizes`` is the WAN mini,
trained on with clips of half the height and width too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import photographs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from judge import Judge
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tqai_core.minis import digits, names

TEXT_TOKENS, TEXT_WIDTH = 4, 64
RECIPES: dict[str, dict[str, Any]] = {
    "flux": dict(
        cls="FluxTransformer2DModel", steps=900, batch=32, lr=2e-3,
        config=dict(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=3, attention_head_dim=128,
            num_attention_heads=1, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False, axes_dims_rope=[16, 56, 56],
        ),
    ),
    "sd3": dict(
        cls="SD3Transformer2DModel", steps=800, batch=32, lr=1.5e-3,
        config=dict(
            sample_size=16, patch_size=2, in_channels=1, out_channels=1, num_layers=3, attention_head_dim=64,
            num_attention_heads=3, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=192,
            pooled_projection_dim=TEXT_WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
        ),
    ),
    "wan": dict(
        cls="WanTransformer3DModel", steps=6000, batch=12, lr=2e-3, ema=0.998,
        config=dict(
            patch_size=[1, 2, 2], num_attention_heads=1, attention_head_dim=128, in_channels=1, out_channels=1,
            text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=256, num_layers=4, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
    ),
    "wan_sizes": dict(cls="WanTransformer3DModel", steps=900, batch=12, lr=6e-4, ema=0.995, base="wan"),
    "z_image": dict(
        cls="ZImageTransformer2DModel", steps=1300, batch=32, lr=2e-3,
        config=dict(
            in_channels=1, dim=128, n_layers=3, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=TEXT_WIDTH,
            axes_dims=[32, 48, 48], axes_lens=[64, 16, 16],
        ),
    ),
    "photo": dict(
        cls="FluxTransformer2DModel", steps=2600, batch=32, lr=2e-3, ema=0.998, spread=1.2,
        prompts=photographs.PROMPTS,
        config=dict(
            patch_size=1, in_channels=12, num_layers=1, num_single_layers=3, attention_head_dim=128,
            num_attention_heads=1, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False, axes_dims_rope=[16, 56, 56],
        ),
    ),
}  # fmt: skip
RECIPES["wan_sizes"]["config"] = RECIPES["wan"]["config"]
ADALN = ("proj_out", "norm1.linear", "norm1_context.linear", "norm.linear", "adaLN_modulation.0", "2-1.linear")


def pack(x: Tensor) -> Tensor:
    """Flux' 2 x 2 packing: ``[b, c, 16, 16] -> [b, 64, 4 c]``, as FluxPipeline._pack_latents does it."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(z: Tensor) -> Tensor:
    return rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", h=math.isqrt(z.shape[1]), p=2, q=2)


def position_ids(side: int) -> Tensor:
    """``[side^2, 3]``: row and column of every token of a square picture."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))


@dataclass(frozen=True)
class Crew:
    """The processes that train one net: each takes its part of every batch, gradients are averaged. One without ``WORLD_SIZE``;
    else torch.distributed's environment says who is who."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> Crew:
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("gloo")
        return cls(int(os.environ.get("RANK", 0)), size)

    def average(self, parameters: list[nn.Parameter]) -> None:
        if self.size > 1:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for p, g in zip(parameters, (flat / self.size).split([g.numel() for g in grads]), strict=True):
                p.grad = g.view_as(p)


class Conditioned(nn.Module):
    """The transformer and the table of its prompts, the empty one last."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.transformer = getattr(diffusers, RECIPES[kind]["cls"])(**RECIPES[kind]["config"])
        self.empty = RECIPES[kind].get("prompts", digits.CLASSES)
        self.tokens = nn.Parameter(torch.randn(self.empty + 1, TEXT_TOKENS, TEXT_WIDTH))
        self.pooled = nn.Parameter(torch.randn(self.empty + 1, TEXT_WIDTH))
        for name, module in self.transformer.named_modules():  # adaLN-zero: every block starts as the identity
            if isinstance(module, nn.Linear) and name.endswith(ADALN) and not ("single" in name and "proj_out" in name):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.register_buffer("txt_ids", torch.zeros(TEXT_TOKENS, 3), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        if self.kind == "z_image":
            images, prompts = list(x[:, :, None].unbind()), list(self.tokens[label].unbind())
            return -torch.stack(self.transformer(images, 1 - sigma, prompts, return_dict=False)[0])[:, :, 0]
        kw: dict[str, Any] = dict(encoder_hidden_states=self.tokens[label], return_dict=False)
        if names.family(self.kind) == "wan":
            return self.transformer(x, timestep=sigma * 1000, **kw)[0]
        kw["pooled_projections"] = self.pooled[label]
        if self.kind == "sd3":
            return self.transformer(x, timestep=sigma * 1000, **kw)[0]
        return self.transformer(x, timestep=sigma, img_ids=position_ids(math.isqrt(x.shape[1])), txt_ids=self.txt_ids, **kw)[0]


@torch.no_grad()
def sample(net: Conditioned, labels: Tensor, seed: int, steps: int = 24, guidance: float = 2.0, side: int = 32) -> Tensor:
    """Plain Euler from noise, guidance 2; returns pixels in [-1, 1]. ``side``: of photographs."""
    shape = {"flux": (64, 4), "photo": (side * side // 4, 12), "wan": (1, 9, 16, 16), "wan_sizes": (1, 9, 16, 16)}.get(
        net.kind, (1, 16, 16)
    )
    x = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, net.empty)])
    grid = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(grid):
        cond, uncond = net(torch.cat([x, x]), now.expand(2 * len(x)), both).chunk(2)
        x = x + (then - now) * (uncond + guidance * (cond - uncond))
    if net.kind == "photo":
        return unpack(x) / photographs.SCALE
    return unpack(x) if net.kind == "flux" else x


def wan_batch(x: Tensor, y: Tensor, progress: float, step: int) -> tuple[Tensor, Tensor]:
    """Short clips first, nine frames last: rotary positions carry over and one frame costs a ninth."""
    if progress < 0.55:
        if step % 2:
            pick, frame = torch.randint(0, len(y), (36,)), int(torch.randint(0, 9, (1,)))
            return x[pick][:, :, frame : frame + 1], y[pick]
        pick, first = torch.randint(0, len(y), (12,)), int(torch.randint(0, 7, (1,)))
        return x[pick][:, :, first : first + 3], y[pick]
    pick = torch.randint(0, len(y), (5,))
    return x[pick], y[pick]


def sizes_batch(x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Nine frames at full size, or their area mean at half the height and width, in turn; the latter are of more clips."""
    pick = torch.randint(0, len(y), (5 if step % 2 else 14,))
    return x[pick] if step % 2 else F.avg_pool3d(x[pick], (1, 2, 2)), y[pick]


def photo_batch(step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Both sizes in turn; the larger has fewer pictures, so that no step takes much longer."""
    side = photographs.SIDES[step % 2]
    prompts = torch.randint(0, photographs.PROMPTS, (batch if side == 16 else batch * 3 // 8,))
    return pack(photographs.crops(prompts, side)) * photographs.SCALE, prompts


def train(kind: str, steps: int, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    recipe = RECIPES[kind]
    if kind != "photo":
        x, y = digits.clips(6000, seed=seed) if names.family(kind) == "wan" else digits.images()
    if kind == "flux":
        x = pack(x)
    net = Conditioned(kind)
    if base := recipe.get("base"):  # goes on from another mini's weights
        weights = {name: value.float() for name, value in load_file(names.weights(base)).items()}
        net.load_state_dict(weights, strict=True)
    ema = copy.deepcopy(net).eval()
    crew = Crew.join()
    torch.manual_seed(seed + crew.rank)
    batch = recipe["batch"] // crew.size
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    log: dict[str, Any] = dict(kind=kind, seed=seed, steps=steps, torch=torch.__version__, loss=[], accuracy=[])
    log["parameters"] = sum(p.numel() for p in net.parameters())
    running, began = None, time.process_time()
    out.mkdir(parents=True, exist_ok=True)

    def judge() -> float:
        if kind == "photo":
            labels = torch.arange(net.empty)
            return Judge.load().accuracy(sample(ema, labels, seed=1), labels)
        labels = torch.arange(20 if names.family(kind) == "wan" else 100) % 10
        return digits.accuracy(sample(ema, labels, seed=1), labels)

    def save() -> None:
        header = dict(format="tqai-mini", version="1", kind=kind, cls=recipe["cls"], config=json.dumps(recipe["config"]))
        weights = {k: v.half().contiguous() for k, v in ema.state_dict().items()}
        save_file(weights, out / f"{kind}.safetensors", {k: str(v) for k, v in header.items()})
        log.update(processes=crew.size, cpu_seconds=round((time.process_time() - began) * crew.size, 1))
        (out / f"{kind}.json").write_text(json.dumps(log, indent=1) + "\n")

    bar = tqdm(range(steps), desc=kind, mininterval=2)
    for step in bar:
        progress = step / steps
        rate = recipe["lr"] * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        if kind == "wan":
            clean, label = wan_batch(x, y, progress, step)
        elif kind == "wan_sizes":
            clean, label = sizes_batch(x, y, step)
        elif kind == "photo":
            clean, label = photo_batch(step, batch)
        else:
            pick = torch.randint(0, len(y), (batch,))
            clean, label = x[pick], y[pick]
        label = torch.where(torch.rand(len(label)) < 0.12, torch.tensor(net.empty), label)
        sigma = torch.sigmoid(torch.randn(len(label)) * recipe.get("spread", 1.0))
        noise = torch.randn_like(clean)
        s = sigma.view(-1, *[1] * (clean.ndim - 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "photo"):
            velocity = net((1 - s) * clean + s * noise, sigma, label)
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        crew.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(recipe.get("ema", 0.995), (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - keep)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
            log["loss"].append([step + 1, round(running, 5)])
        if crew.rank == 0 and ((step + 1) % max(steps // 4, 1) == 0 or step + 1 == steps):
            save()  # first, in case the judge fails
            log["accuracy"].append([step + 1, round(judge(), 4)])
            save()
            tqdm.write(f"{kind} step {step + 1}: loss {running:.4f}, sample accuracy {log['accuracy'][-1][1]}")
    if crew.rank == 0:
        print(json.dumps({k: log[k] for k in ("kind", "steps", "parameters", "cpu_seconds")} | {"accuracy": log["accuracy"][-1][1]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="optimiser steps; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; default: where the mini is looked for")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.kind, args.steps or RECIPES[args.kind]["steps"], args.seed, args.out or names.folder(args.kind))


if __name__ == "__main__":
    main()
