"""Every kernel on a GPU: its result beside the plain torch form in fp32, its time beside the best dense attention. JSON to standard output.

    TQAI_TRITON=1 python benchmarks/gpu.py [--tokens 8192] [--json FILE]

Without CUDA the same code runs on the CPU, with fewer tokens: that shows that the script works, and is no figure of a GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai_core.attention import block_attention, packed
from tqai_core.attention.far_field import FAR
from tqai_core.attention.sparse import BACKENDS
from tqai_core.codecs.turbo import Turbo
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.policy import Plan
from tqai_core.metrics import nmse
from tqai_core.registry import build
from tqai_core.report import dumps

HEADS, BLOCK_Q, BLOCK_K = 8, 256, 64
ROUNDS, LIMIT = 10, 60.0  # of a timing; seconds for one kernel
CLOSE = {torch.float32: 1e-8, torch.bfloat16: 1e-4, torch.float16: 1e-5}  # NMSE to fp32 that passes


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of a few calls; on CUDA by events, so that the host's own time does not count."""
    run()
    took, began = [], time.perf_counter()
    while len(took) < ROUNDS and time.perf_counter() - began < LIMIT:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            took.append(start.elapsed_time(end) / 1e3)
        else:
            at = time.process_time()
            run()
            took.append(time.process_time() - at)
    return median(took)


def checked(about: dict[str, Any], run: Callable[[], Tensor], exact: Tensor, dense: float, device: torch.device) -> dict[str, Any]:
    """A row: error and time, or why there is none. A kernel that fails says so, and the others go on."""
    try:
        error = nmse(run().float(), exact)
        took = seconds(run, device)
    except Exception as failure:
        return about | {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    return about | {"nmse": error, "ok": error <= CLOSE[about["type"]], "seconds": took, "over_dense": dense / took}


def sparse(n: int, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for dtype, d, density in product((torch.bfloat16, torch.float16, torch.float32), (64, 128), (0.1, 0.25, 0.5)):
        g = torch.Generator().manual_seed(n + d)
        q, k, v = (torch.randn(1, HEADS, n, d, generator=g).to(device, dtype) for _ in range(3))
        mass = build("scorer", "bsa").mass(q, k, BLOCK_Q, BLOCK_K)
        index = mass.topk(max(round(density * mass.shape[-1]), 1), -1).indices
        dense = seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), device)
        for name, far in product(BACKENDS, (None, *FAR)):
            like = dtype if far == "clusters" else torch.float32  # in another type other keys are seeds, and none of the two is wrong
            exact = block_attention(*(x.to(like) for x in (q, k, v)), index, BLOCK_Q, BLOCK_K, far=far, backend="torch").float()
            about = {"kernel": "sparse", "backend": name, "type": dtype, "d": d, "density": density, "far": far or "none", "tokens": n}
            call = lambda q=q, k=k, v=v, i=index, f=far, b=name: block_attention(q, k, v, i, BLOCK_Q, BLOCK_K, far=f, backend=b)  # noqa: E731
            rows.append(checked(about, call, exact, dense, device))
    return rows


def cached(n: int, device: torch.device) -> list[dict[str, Any]]:
    """One step of a language model on a packed cache: ``native=False`` is the plain torch form."""
    rows = []
    for dtype, d, bits in product((torch.bfloat16, torch.float32), (64, 128), ((8, 8), (4, 4), (3, 2), (2, 2))):
        g = torch.Generator().manual_seed(d)
        kv = PackedKV(Plan(*bits))
        k, v = (torch.randn(1, HEADS, n, d, generator=g).to(device, dtype) for _ in range(2))
        q = torch.randn(1, 4 * HEADS, 1, d, generator=g).to(device, dtype)
        kv.append(k, v)
        kv.observe(q)
        kv.settle()
        exact = packed.attend(q.float(), kv, scaling=d**-0.5, native=False)
        dense = seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), device)
        for native in (True, False):
            about = {"kernel": "packed", "backend": "kernel" if native else "torch", "type": dtype, "d": d, "bits": list(bits), "tokens": n}
            call = lambda q=q, kv=kv, native=native, d=d: packed.attend(q, kv, scaling=d**-0.5, native=native)  # noqa: E731
            rows.append(checked(about, call, exact, dense, device))
    return rows


def coded(n: int, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for bits in (8, 4, 3, 2):
        codec, x = Turbo(bits=bits), torch.randn(n, 128, generator=torch.Generator().manual_seed(bits)).to(device)
        made = codec.encode(x)
        there, here = codec.decode(made).cpu(), codec.decode(codec.encode(x.cpu()))
        encode, decode = (lambda c=codec, x=x: c.encode(x)), (lambda c=codec, m=made: c.decode(m))
        about = {"kernel": "codec", "bits": bits, "nmse_to_cpu": nmse(there, here), "bytes": x.nbytes}
        rows.append(about | {"encode_seconds": seconds(encode, device), "decode_seconds": seconds(decode, device)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192 if torch.cuda.is_available() else 512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_grad_enabled(False)
    rows = [*sparse(args.tokens, device), *cached(args.tokens, device), *coded(args.tokens, device)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}, no GPU"
    result = {"bench": "gpu", "device": name, "torch": torch.__version__, "tokens": args.tokens, "rows": rows}
    text = dumps({**result, "rows": [{k: str(v) if isinstance(v, torch.dtype) else v for k, v in row.items()} for row in rows]})
    print(text) if args.json is None else args.json.write_text(text + "\n", encoding="utf-8")
    wrong = [row for row in rows if row.get("ok") is False]
    for row in wrong:
        print(f"wrong: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
