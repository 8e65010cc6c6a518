"""Students of the minis: as many steps as a user of a distilled model takes, guidance inside, weights as a low-rank difference.

    python benchmarks/minis/distil.py {photo_8,photo_4,wan_4} --cache FOLDER [--prepare N] [--steps N] [--seed S]

The teacher draws with 24 Euler steps and its guidance; of each trajectory the latents at every third step are kept. The student
learns the mean velocity between two of its own nodes (progressive distillation, Salimans & Ho 2202.00512, on the teacher's own
trajectories), with the prompt alone. Only ``up @ down`` is learnt, added to every linear layer (LoRA, Hu et al. 2106.09685).
A tenth of the trajectories is held back: the log has the error by step on some seen and on those. Processes may share the work
(``WORLD_SIZE``, ``RANK``, ``MASTER_ADDR``; the students of photographs were made by two).
Writes fp16 safetensors with ``NAME.down`` and ``NAME.up``, and a JSON log.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from train_dit import Conditioned, Crew

from tqai_core.minis import names

FINE, KEPT = 24, 3  # Euler steps of the teacher; every third latent is kept


@dataclass(frozen=True)
class Recipe:
    steps: int  # of the student
    updates: int
    rank: int
    guidance: float
    shapes: tuple[tuple[tuple[int, ...], int, int], ...]  # of latents: shape, trajectories, batch
    lr: float = 2e-3


PHOTOS = (((64, 12), 320, 32), ((256, 12), 240, 12))
SHARES = 4  # in which the trajectories are drawn, so that processes may share the work
RECIPES = {
    "photo_8": Recipe(8, 3500, 32, 1.5, PHOTOS),
    "photo_4": Recipe(4, 2500, 32, 1.5, PHOTOS),
    "wan_4": Recipe(4, 500, 16, 2.0, (((1, 9, 16, 16), 96, 6),)),
}


class LowRank(nn.Module):
    """A frozen linear layer and its learnt difference."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        rank = min(rank, base.in_features, base.out_features)
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def weight(self) -> Tensor:  # diffusers asks linear layers for their dtype
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def teacher(kind: str) -> Conditioned:
    net = Conditioned(kind)
    net.load_state_dict({name: x.float() for name, x in load_file(names.weights(kind)).items()}, strict=False)
    return net.eval().requires_grad_(False)


def add_low_rank(module: nn.Module, rank: int, prefix: str = "") -> dict[str, LowRank]:
    """Puts a :class:`LowRank` in the place of every linear layer below ``module``; by name."""
    found: dict[str, LowRank] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found[prefix + name] = LowRank(child, rank)
            setattr(module, name, found[prefix + name])
        else:
            found |= add_low_rank(child, rank, f"{prefix}{name}.")
    return found


@torch.no_grad()
def trajectories(net: Conditioned, recipe: Recipe, seed: int) -> list[tuple[Tensor, Tensor]]:
    """A share: for each shape the latents at every third of 24 steps ``[n, 9, ...]`` and their prompts ``[n]``."""
    out = []
    grid = torch.linspace(1, 0, FINE + 1)
    g = torch.Generator().manual_seed(seed)
    for shape, count, batch in recipe.shapes:
        kept, prompts = [], torch.arange(count // SHARES) % net.empty
        for part in tqdm(prompts.split(batch), desc=f"trajectories {shape}", mininterval=5):
            x = torch.randn(len(part), *shape, generator=g)
            nodes = [x]
            both = torch.cat([part, torch.full_like(part, net.empty)])
            for i, (now, then) in enumerate(pairwise(grid), 1):
                with torch.autocast("cpu", torch.bfloat16):
                    cond, uncond = net(torch.cat([x, x]), now.expand(2 * len(x)), both).float().chunk(2)
                x = x + (then - now) * (uncond + recipe.guidance * (cond - uncond))
                if i % KEPT == 0:
                    nodes.append(x)
            kept.append(torch.stack(nodes, 1))
        out.append((torch.cat(kept), prompts))
    return out


Trajectories = list[tuple[Tensor, Tensor]]


def parted(found: Trajectories) -> tuple[Trajectories, Trajectories]:
    """The trajectories that the student learns from, and a tenth, of every prompt, which it never sees."""
    learnt, held = [], []
    for x, prompts in found:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
        order = order[prompts[order].argsort(stable=True)]  # every prompt in turn
        for into, pick in ((held, order[4::10]), (learnt, torch.cat([order[i::10] for i in range(10) if i != 4]))):
            into.append((x[pick], prompts[pick]))
    return learnt, held


@torch.no_grad()
def errors(net: Conditioned, found: Trajectories, recipe: Recipe, most: int = 24) -> list[float]:
    """The mean square error on some trajectories of the largest shape, by the student's node."""
    every, (nodes, prompts) = FINE // KEPT // recipe.steps, found[-1]
    pick = torch.linspace(0, len(prompts) - 1, most).long()
    losses = []
    for k in range(recipe.steps):
        x, then = nodes[pick, k * every], nodes[pick, (k + 1) * every]
        with torch.autocast("cpu", torch.bfloat16):
            guess = net(x, torch.full((most,), 1 - k / recipe.steps), prompts[pick])
        losses.append(round(F.mse_loss(guess.float(), (x - then) * recipe.steps).item(), 5))
    return losses


def batches(found: list[tuple[Tensor, Tensor]], recipe: Recipe, share: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Latents, their sigma, prompts, and the mean velocity to the student's next node; shapes take turns.
    ``share``: processes that divide a batch."""
    every = FINE // KEPT // recipe.steps  # kept latents between two nodes of the student
    while True:
        for (nodes, prompts), (_, _, batch) in zip(found, recipe.shapes, strict=True):
            many = batch // share
            pick, k = torch.randint(0, len(prompts), (many,)), torch.randint(0, recipe.steps, (many,))
            x, then = nodes[pick, k * every], nodes[pick, (k + 1) * every]
            yield x, 1 - k / recipe.steps, prompts[pick], (x - then) * recipe.steps


def prepare(kind: str, share: int, seed: int, cache: Path) -> list[tuple[Tensor, Tensor]]:
    """A share of the trajectories: from ``cache``, or drawn and written there."""
    path = cache / f"{names.STUDENTS[kind]}-{seed}-{share}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(trajectories(teacher(names.STUDENTS[kind]), RECIPES[kind], seed=1000 + SHARES * seed + share), path)
    return torch.load(path)


def distil(kind: str, updates: int, seed: int, out: Path, cache: Path) -> None:
    torch.manual_seed(seed)
    recipe, began = RECIPES[kind], time.process_time()
    shares = [prepare(kind, share, seed, cache) for share in range(SHARES)]
    found = [(torch.cat([x for x, _ in part]), torch.cat([p for _, p in part])) for part in zip(*shares, strict=True)]
    found, held = parted(found)
    net = teacher(names.STUDENTS[kind])
    layers = add_low_rank(net.transformer, recipe.rank)
    learnt = [p for layer in layers.values() for p in (layer.down, layer.up)]
    crew = Crew.join()
    torch.manual_seed(seed + crew.rank)
    mean = [p.detach().clone() for p in learnt]
    optimizer = torch.optim.AdamW(learnt, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    log: dict[str, Any] = dict(kind=kind, seed=seed, updates=updates, rank=recipe.rank, guidance=recipe.guidance, torch=torch.__version__)
    log |= dict(
        trajectories={str(shape): count for shape, count, _ in recipe.shapes},
        parameters=sum(p.numel() for p in learnt),
        loss=[],
        seen=[],
        unseen=[],
    )
    running = None
    source = batches(found, recipe, crew.size)
    for step in (bar := tqdm(range(updates), desc=kind, mininterval=5)):
        rate = recipe.lr * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / updates)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, sigma, prompts, velocity = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            guess = net(x, sigma, prompts)
        loss = F.mse_loss(guess.float(), velocity)
        optimizer.zero_grad()
        loss.backward()
        crew.average(learnt)
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        torch._foreach_lerp_(mean, [p.detach() for p in learnt], 1 - min(0.98, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
            log["loss"].append([step + 1, round(running, 5)])
        if crew.rank == 0 and ((step + 1) % 250 == 0 or step + 1 == updates):
            for name, part in (("seen", found), ("unseen", held)):
                log[name].append([step + 1, *errors(net, part, recipe)])
        if crew.rank == 0 and ((step + 1) % 300 == 0 or step + 1 == updates):
            log |= dict(processes=crew.size, cpu_seconds=round((time.process_time() - began) * crew.size, 1))
            save(kind, recipe, layers, mean, log, out)
    if crew.rank == 0:
        print(json.dumps({k: log[k] for k in ("kind", "updates", "parameters", "cpu_seconds")} | {"loss": log["loss"][-1]}))


def save(kind: str, recipe: Recipe, layers: dict[str, LowRank], mean: list[Tensor], log: dict[str, Any], out: Path) -> None:
    tensors = {f"{name}.{part}": mean[2 * i + j] for i, name in enumerate(layers) for j, part in enumerate(("down", "up"))}
    header = dict(format="tqai-mini-student", version="1", kind=kind, teacher=names.STUDENTS[kind], steps=recipe.steps)
    save_file(
        {name: x.half().contiguous() for name, x in tensors.items()}, out / f"{kind}.safetensors", {k: str(v) for k, v in header.items()}
    )
    (out / f"{kind}.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="updates; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the trajectories, which students of one teacher share")
    parser.add_argument("--prepare", type=int, choices=range(SHARES), metavar="N", help="draw this share of the trajectories and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.prepare is not None:
        prepare(args.kind, args.prepare, args.seed, args.cache)
        return
    distil(args.kind, args.steps or RECIPES[args.kind].updates, args.seed, names.folder(args.kind), args.cache)


if __name__ == "__main__":
    main()
