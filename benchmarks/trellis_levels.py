"""Train the levels of the trellis codec: Lloyd's iteration around the Viterbi search, on Gaussian samples.

    python benchmarks/trellis_levels.py [--out tqai_core/codecs/trellis_levels.json]

Levels are the means of the samples the search gives them; the two halves are kept symmetric. Seeded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from tqai_core.codecs import viterbi
from tqai_core.workspace import Workspace

T, N = 256, 8192  # 2 million samples a round


def train(bits: int, rounds: int, seed: int = 0) -> tuple[list[float], float]:
    count = 2 ** (bits + 1)
    level = 3**0.5 * torch.special.ndtri((torch.arange(count) + 0.5) / count)  # density^(1/3), the high-rate optimum
    g = torch.Generator().manual_seed(seed)
    error = 0.0
    for _ in tqdm(range(rounds), desc=f"{bits} bits"):
        y = torch.randn(N, T, generator=g)
        tables = viterbi.Trellis4(bits, level.float(), y.device)
        work = Workspace(y.device)
        packed, _, _ = tables.encode(y.clone(), torch.ones(N, 1), None, work)
        q = tables.decode(packed, T, work)
        error = float((y - q).square().mean())
        index = torch.bucketize(q.reshape(-1), (level[1:] + level[:-1]) / 2)
        total = torch.zeros(count).index_add_(0, index, y.reshape(-1))
        seen = torch.zeros(count).index_add_(0, index, torch.ones(y.numel()))
        mean = torch.where(seen > 20, total / seen.clamp_min(1), level)
        level = ((mean - mean.flip(0)) / 2).sort().values
    return [round(float(v), 5) for v in level[count // 2 :]], error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=viterbi.LEVELS)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = {}
    for bits in range(1, 9):
        rounds = args.rounds if bits <= 4 else max(args.rounds // 4, 1)  # close to the high-rate optimum already
        table[str(bits)], error = train(bits, rounds)
        print(f"{bits} bits: MSE {error:.6f}", flush=True)
        args.out.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
