"""Train the mini language model that tqai ships: transformers' Qwen2 class, bytes, text of Python's standard library.

    python benchmarks/minis/train_lm.py [--steps A,B,C] [--seed S] [--out DIR]

Every Python installation carries the text: the library's sources and the language reference (``pydoc_data``). Whole
files are held out by a hash of their name. The context grows from 256 to 512 to 2048 bytes, so that a cache of a few
thousand tokens is read within what was trained. Writes fp16 safetensors (config in the header, 128 KiB of held-out text
beside the weights) and a JSON log with the list of files, the hash of the text and the loss. About 25 CPU minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

STAGES = ((256, 12), (512, 6), (2048, 2))  # bytes of context, windows a step
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
HELD_OUT_BYTES = 1 << 17
CONFIG: dict[str, Any] = dict(
    vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8192, rope_theta=10000.0, tie_word_embeddings=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def corpus() -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Bytes to train on and bytes held out, with the names of their files."""
    top = Path(sysconfig.get_paths()["stdlib"])
    train: list[tuple[str, bytes]] = []
    held: list[tuple[str, bytes]] = []
    seen: set[bytes] = set()
    for path in sorted(top.rglob("*.py"), key=lambda p: p.relative_to(top).as_posix()):
        name = path.relative_to(top).as_posix()
        if SKIP & set(name.split("/")[:-1]):
            continue
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if len(text) < 600 or digest in seen:
            continue
        seen.add(digest)
        (held if hashlib.sha256(name.encode()).digest()[0] < 10 else train).append((name, text))
    order = np.random.RandomState(0).permutation(len(train))
    train = [train[i] for i in order]
    together = lambda files: np.frombuffer(b"\0".join(text for _, text in files), dtype=np.uint8)  # noqa: E731
    return together(train), together(held), [name for name, _ in train], [name for name, _ in held]


def windows(text: Tensor, length: int, count: int, rng: np.random.RandomState) -> Tensor:
    starts = rng.randint(0, len(text) - length - 1, size=count)
    return torch.stack([text[i : i + length + 1] for i in starts]).long()


@torch.no_grad()
def loss_of(model: Qwen2ForCausalLM, x: Tensor) -> float:
    model.eval()
    total = 0.0
    for part in x.split(4):
        total += F.cross_entropy(model(part[:, :-1], use_cache=False).logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / x[:, 1:].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="800,200,60", help="steps at a context of 256, 512 and 2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("tqai_core/minis"))
    args = parser.parse_args()
    steps = [int(n) for n in args.steps.split(",")]
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, held, train_files, held_files = corpus()
    print(f"{len(train):,} bytes of {len(train_files)} files to train on, {len(held):,} of {len(held_files)} held out", flush=True)
    text, unseen = torch.from_numpy(train.copy()), torch.from_numpy(held.copy())
    check = {length: windows(unseen, length, 8192 // length, np.random.RandomState(7)) for length in (512, 2048)}
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    rng = np.random.RandomState(args.seed + 1)
    log: dict[str, Any] = {
        "seed": args.seed, "steps": steps, "torch": torch.__version__, "config": CONFIG,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_sha256": hashlib.sha256(train.tobytes()).hexdigest(), "held_out_sha256": hashlib.sha256(held.tobytes()).hexdigest(),
        "files": train_files, "held_out_files": held_files, "loss": [],
    }  # fmt: skip
    began, done, seen, running = time.process_time(), 0, 0, 0.0
    for (length, batch), count in zip(STAGES, steps, strict=True):
        for _ in range(count):
            part = done / sum(steps)
            for group in adam.param_groups:
                group["lr"] = args.lr * min(1.0, (done + 1) / 60) * (1 - 0.97 * part)
            x = windows(text, length, batch, rng)
            loss = F.cross_entropy(model(x[:, :-1], use_cache=False).logits.flatten(0, 1), x[:, 1:].flatten())
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            done, seen, running = done + 1, seen + length * batch, 0.95 * running + 0.05 * loss.item()
            if done % 100 == 0 or done == sum(steps):
                entry = {
                    "step": done,
                    "bytes": seen,
                    "train_nats": round(loss.item(), 4),
                    "held_out_nats": round(loss_of(model, check[512]), 4),
                }
                log["loss"].append(entry)
                print(json.dumps(entry | {"cpu_s": round(time.process_time() - began)}), flush=True)
    half = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    model.load_state_dict({name: p.float() for name, p in half.items()})
    for length, x in check.items():
        log[f"perplexity_{length}"] = round(math.exp(loss_of(model, x)), 4)
    log["cpu_seconds"] = round(time.process_time() - began)
    args.out.mkdir(parents=True, exist_ok=True)
    header = {"cls": "Qwen2ForCausalLM", "config": json.dumps(CONFIG)}
    save_file({**half, "held_out": unseen[:HELD_OUT_BYTES].contiguous()}, str(args.out / "lm.safetensors"), header)
    (args.out / "lm.json").write_text(json.dumps({"kind": "lm", **log}, indent=1) + "\n")
    print({key: log[key] for key in log if key.startswith("perplexity")}, flush=True)


if __name__ == "__main__":
    main()
