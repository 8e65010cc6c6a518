"""Train the judge of generated photographs on real crops of both sizes.

    python benchmarks/minis/train_judge.py [--steps N] [--seed S]

Writes judge.safetensors: the weights, and for each size the mean and covariance of the features of 20,000 other crops. The log says how
many of these the judge reads as what they are, and the Fréchet distance of a few hundred of them to the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json

import photographs
import torch
import torch.nn.functional as F
from judge import CLASSES, FILE, Judge, Reader, frechet, moments
from safetensors.torch import save_file
from tqdm import tqdm

REAL = 20_000  # crops a size behind the real mean and covariance


def train(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in (bar := tqdm(range(steps), mininterval=2)):
        side = photographs.SIDES[step % 2]
        prompts = torch.randint(0, photographs.PROMPTS, (128 if side == 16 else 48,))
        x = photographs.crops(prompts, side)
        x = x + 0.05 * torch.rand(1) * torch.randn_like(x)  # so that a little noise of a sampler does not decide
        loss = F.cross_entropy(reader(x)[1], prompts % CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    reader.eval().requires_grad_(False)
    judge = Judge(reader, {})
    tensors = {name: x.contiguous() for name, x in reader.state_dict().items()}
    log: dict[str, object] = dict(seed=seed, steps=steps, real_crops=REAL)
    for side in photographs.SIDES:
        g = torch.Generator().manual_seed(1000 + side)
        prompts = torch.arange(REAL) % photographs.PROMPTS
        parts = [photographs.crops(part, side, g) for part in prompts.split(500)]
        features = torch.cat([judge.features(part) for part in parts])
        tensors[f"mean_{side}"], tensors[f"covariance_{side}"] = moments(features)
        right = reader.read(features).argmax(1) == prompts % CLASSES
        log[f"accuracy_{side}"] = round(float(right.float().mean()), 4)
        log[f"accuracy_by_photograph_{side}"] = {
            name: round(float(right[prompts % CLASSES == i].float().mean()), 3) for i, name in enumerate(photographs.NAMES)
        }
        for count in (200, 500):  # the same distance of so many real crops: what no generator can be expected to beat
            log[f"distance_of_{count}_real_{side}"] = round(frechet(moments(features[:count]), moments(features[count:])), 4)
    save_file(tensors, FILE)
    log["sha256"] = hashlib.sha256(FILE.read_bytes()).hexdigest()
    FILE.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.steps, args.seed)
