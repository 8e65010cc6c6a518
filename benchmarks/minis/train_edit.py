"""Train the edit mini (:mod:`edit`) by rectified flow: python benchmarks/minis/train_edit.py [--steps N] [--seed S] [--out DIR]

The first steps have one reference, later ones up to four. Writes fp16 safetensors (EMA weights, config in the header) and a JSON log
of the loss and of the PSNR to the pictures asked for, on digits that the training has not seen, also with references of other pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import edit
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tqai_core.metrics import psnr

STEPS, RATE = 1000, 2e-3
PICTURES = {1: 5, 2: 4, 4: 3}  # of a step by views; each is asked for in every way
ADALN = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation", "norm_out")


def start(seed: int, path: Path | None) -> edit.Edit:
    torch.manual_seed(seed)
    if path is not None:
        return edit.load(path).requires_grad_(True).train()
    net = edit.Edit()
    for name in ADALN:  # every block starts as the identity
        nn.init.zeros_(getattr(net.transformer, name).linear.weight)
    nn.init.zeros_(net.transformer.proj_out.weight)
    return net


def judge(net: edit.Edit) -> dict[str, float]:
    """PSNR to the pictures asked for, by views; ``other``: where these are of other pictures."""
    out = {}
    for name, count in {"1": 1, "4": 4, "other": 4}.items():
        references, task, wanted = edit.batch(24, count, True, torch.Generator().manual_seed(1))
        given = references.roll(1, 0) if name == "other" else references
        out[name] = round(psnr(edit.sample(net, given, task, 8, seed=1), wanted), 2)
    return out


def loss_of(net: edit.Edit, pictures: int, views: int, g: torch.Generator) -> Tensor:
    """All tasks of some pictures, each at its own noise. The references go through the model once, with the first task; the others read
    what it keeps."""
    references, task, wanted = edit.batch(pictures, views, False, g, every_task=True)
    clean, sigma = edit.pack(wanted), torch.sigmoid(torch.randn(len(task), generator=g) + 0.5)
    noise, s = torch.randn(clean.shape, generator=g), sigma[:, None, None]
    x, n = (1 - s) * clean + s * noise, pictures
    v, cache = net.first(x[:n], references, sigma[:n], net.given(task[:n]))
    for layer in cache.double_block_caches + cache.single_block_caches:
        layer.store(*(part.repeat(len(edit.TASKS) - 1, 1, 1, 1) for part in layer.get()))
    v = torch.cat([v, net.later(x[n:], cache, sigma[n:], net.given(task[n:]))])
    return F.mse_loss(v, noise - clean)


def train(steps: int, seed: int, out: Path, path: Path | None) -> None:
    net = start(seed, path)
    ema, g = copy.deepcopy(net).eval(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    log: dict[str, Any] = dict(kind="edit", seed=seed, steps=steps, torch=torch.__version__, loss=[], psnr=[])
    log["parameters"], began, running = sum(p.numel() for p in net.parameters()), time.process_time(), 1.0
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(steps), mininterval=10)
    for step in bar:
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        views = 1 if progress < 0.3 else (1, 2, 4, 4)[int(torch.randint(4, (1,), generator=g))]
        loss = loss_of(net, PICTURES[views], views, g)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
            log["loss"].append([step + 1, round(running, 5)])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log["psnr"].append([step + 1, judge(ema)])
            log["cpu_seconds"] = round(time.process_time() - began, 1)
            save_file({k: v.half().contiguous() for k, v in ema.state_dict().items()}, out / "edit.safetensors", edit.header())
            (out / "edit.json").write_text(json.dumps(log, indent=1) + "\n")
            tqdm.write(f"step {step + 1}: loss {running:.4f}, PSNR {log['psnr'][-1][1]}, {log['cpu_seconds']} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--out", type=Path, default=edit.FILE.parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.steps, args.seed, args.out, args.start)


if __name__ == "__main__":
    main()
