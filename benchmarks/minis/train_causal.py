"""Train the causal video mini: the WAN mini as a block-causal model of moving digits (see bench/causal.py).

    python benchmarks/minis/train_causal.py [--steps N] [--seed S] [--out FILE]

Teacher forcing, as CausVid and Self-Forcing begin (2412.07772, 2506.08009): a clip goes through the model twice at once, clean and noisy.
Each noisy block of frames sees the clean blocks before it. The clean frames get a little noise of their own, so that the model bears its
own errors when it rolls; each block has a time of its own. The first frames of a clip stand before frames of much later, as sinks do in a
rolling history. Writes fp16 safetensors of what was trained (EMA) and a JSON log: loss, and the share of frames that the judge reads
as what was asked for, by windows of eight frames of a video of 64.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.causal import BLOCK, EMPTY, FROZEN, SINK, WEIGHTS, WINDOW, Causal, Dense, weights_of

from tqai_core.hosts.diffusers import minis
from tqai_core.minis import digits

LENGTH, FRAMES = 64, 64  # frames of a training clip, and of a judged video
STAGES = ((0.45, 8, 5), (0.75, 16, 2), (1.0, WINDOW, 1))  # until which share of the steps, frames of a clip, clips of a step
CONTEXT = 0.2  # most noise of the clean frames
RATE = 1e-3


def batch(x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """Clips ``[n, 1, frames, 16, 16]`` whose first frames are those of the video, the rest later ones."""
    frames, count = next((frames, count) for share, frames, count in STAGES if progress < share)
    pick = torch.randint(0, len(y), (count,))
    rest = frames - SINK
    first = SINK if torch.rand(()) < 0.4 else int(torch.randint(SINK, LENGTH - rest + 1, ()))
    clean = torch.cat([x[pick, :, :SINK], x[pick, :, first : first + rest]], 2)
    return clean.float(), torch.where(torch.rand(count) < 0.12, torch.tensor(EMPTY), y[pick])


def judge(model: Causal, tokens: Tensor, steps: int = 8) -> list[float]:
    """Accuracy by windows of eight frames."""
    labels = torch.arange(10)
    model.begin([Dense() for _ in model.readers])
    video = model.roll(torch.randn(10, 1, FRAMES, 16, 16, generator=torch.Generator().manual_seed(1)), tokens[labels], steps)
    return [round(digits.accuracy(part, labels), 4) for part in video.split(8, 2)]


def train(steps: int, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    x, y = digits.clips(2500, seed=seed + 1, frames=LENGTH)
    x = x.half()
    model = Causal()
    tokens = minis.prompts("wan", range(EMPTY + 1))[0]
    own = [p.requires_grad_() for name, p in model.net.named_parameters() if not any(part in name for part in FROZEN)]
    average = Causal(copy.deepcopy(model.net).eval())
    optimizer = torch.optim.AdamW(own, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    log: dict[str, Any] = dict(kind="causal", seed=seed, steps=steps, torch=torch.__version__, loss=[])
    kept = [p for name, p in average.net.named_parameters() if not any(part in name for part in FROZEN)]
    running, began = None, time.process_time()
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        clean, label = batch(x, y, progress)
        sigma = torch.sigmoid(torch.randn(len(label), clean.shape[2] // BLOCK))
        s, noise = sigma.repeat_interleave(BLOCK, 1)[:, None, :, None, None], torch.randn_like(clean)
        seen = clean + CONTEXT * torch.rand(len(label), 1, 1, 1, 1) * torch.randn_like(clean)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model.teach(seen, (1 - s) * clean + s * noise, sigma, tokens[label])
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(kept, own, 1 - min(0.99, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            log["loss"].append([step + 1, round(running, 5)])
            print(f"step {step + 1}: loss {running:.4f}, {time.process_time() - began:.0f} CPU s", flush=True)
    log |= {"cpu_seconds": round(time.process_time() - began, 1), "accuracy": judge(average, tokens)}
    save_file(weights_of(average.net), out, dict(format="tqai-mini", version="1", kind="causal"))
    out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps({k: log[k] for k in ("steps", "cpu_seconds", "accuracy")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=220, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.steps, args.seed, args.out)


if __name__ == "__main__":
    main()
