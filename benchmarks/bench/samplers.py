"""ComfyUI's samplers on the trained minis: tqai's default against fewer steps at equal model calls. Runs inside a real ComfyUI.

    CHECKOUT/.venv/bin/python benchmarks/bench/samplers.py CHECKOUT [--samplers heun,lcm] [--kinds flux] [--shifts 1,3,8] [--json FILE]

Each sampler runs 24 steps with the scheduler ``simple``. Errors are PSNR in dB to the same sampler's own exact run of the same seed;
for samplers that add noise this is the run with the same noise. Fewer steps take at least as many calls as tqai did.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "comfyui"), str(ROOT / "benchmarks"), str(ROOT)]
SAMPLERS = (
    "euler", "heun", "exp_heun_2_x0", "dpm_2", "dpm_2_ancestral", "uni_pc", "res_multistep", "dpmpp_2m", "deis", "ipndm", "er_sde",
    "euler_ancestral", "dpmpp_2m_sde", "lcm", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
)  # fmt: skip
STEPS, SEEDS, LABELS = 24, (0, 1, 2), (3, 7)
SHAPES = {"flux": (16, 16, 16), "sd3": (16, 16, 16), "wan": (16, 9, 16, 16)}
GUIDANCE = {"flux": 1.0, "sd3": 2.0, "wan": 2.0}


class Bench:
    def __init__(self, checkout: str, folder: Path) -> None:
        import hosts

        self.host = hosts.real(checkout, folder)
        import comfy.sample
        import convert
        import torch
        from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3

        torch.set_num_threads(1)
        self.torch, self.convert, self.sampling = torch, convert, comfy.sample
        self.flux_shift, self.shift = ModelSamplingFlux(), ModelSamplingSD3()
        self.models = {kind: self.host.load(f"mini_{kind}") for kind in SHAPES}

    def shifted(self, kind: str, shift: float) -> Any:
        import math

        if kind == "flux":  # its node gives exp(shift)
            return self.flux_shift.patch(self.models[kind], math.log(shift), math.log(shift), 1024, 1024)[0]
        return self.shift.patch(self.models[kind], shift, 1000)[0]

    def conds(self, kind: str, label: int) -> list[Any]:
        tokens, pooled = self.convert.conditioning(kind, [label])
        extra = {} if kind == "wan" else {"pooled_output": pooled}
        return [[tokens, extra | ({"guidance": 1.0} if kind == "flux" else {})]]

    def run(self, model: Any, kind: str, sampler: str, steps: int, seed: int) -> tuple[Any, int]:
        """The latent and the number of evaluations that the model really made."""
        torch, count = self.torch, [0]
        noise = torch.randn(1, *SHAPES[kind], generator=torch.Generator().manual_seed(seed))
        label = LABELS[seed % len(LABELS)]
        with torch.inference_mode(), self.host.forwards(model) as seen:
            out = self.sampling.sample(
                model, noise, steps, GUIDANCE[kind], sampler, "simple", self.conds(kind, label), self.conds(kind, 10),
                torch.zeros_like(noise), denoise=1.0, seed=seed, disable_pbar=True,
            )  # fmt: skip
        count[0] = len(seen)
        return model.model.process_latent_in(out)[:, :1].float(), count[0]


def psnr(x: Any, exact: Any) -> float:
    from tqai_core.metrics import psnr as of

    return min(of(x, exact), 200.0)


def row(bench: Bench, kind: str, sampler: str, shift: float) -> dict[str, Any]:
    plain, found = bench.shifted(kind, shift), []
    patched = bench.host.compress(plain)
    for seed in SEEDS:
        exact, whole = bench.run(plain, kind, sampler, STEPS, seed)
        ours, calls = bench.run(patched, kind, sampler, STEPS, seed)
        report = bench.host.report()
        made: dict[str, Any] = {"ours": psnr(ours, exact), "calls": calls, "whole": whole, "fewer": None, "steps": None}
        if calls < whole:
            for steps in range(max(STEPS * calls // whole - 1, 2), STEPS):
                latent, used = bench.run(plain, kind, sampler, steps, seed)
                if used >= calls:
                    made |= {"fewer": psnr(latent, exact), "steps": steps}
                    break
        made["why"] = sorted({f["why"] for f in report["fallbacks"]})
        found.append(made)
    middle = {
        name: median(v) if (v := [m[name] for m in found if m[name] is not None]) else None for name in ("ours", "fewer", "calls", "whole")
    }
    worst = {f"{name}_min": min((m[name] for m in found if m[name] is not None), default=None) for name in ("ours", "fewer")}
    return {"kind": kind, "sampler": sampler, "shift": shift, **middle, **worst, "why": sorted({w for m in found for w in m["why"]})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout")
    words = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--samplers", type=words, default=SAMPLERS)
    parser.add_argument("--kinds", type=words, default=tuple(SHAPES))
    parser.add_argument("--shifts", type=lambda text: tuple(map(float, text.split(","))), default=(1.0, 3.0, 8.0))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench, rows = Bench(str(Path(args.checkout).resolve()), Path(folder)), []
        for kind in args.kinds:
            for sampler in args.samplers:
                for shift in args.shifts:
                    r = row(bench, kind, sampler, shift)
                    rows.append(r)
                    figures = " ".join(
                        f"{name} {r[name]:.1f}" if r[name] is not None else f"{name} -"
                        for name in ("ours", "ours_min", "fewer", "fewer_min")
                    )
                    print(
                        f"{kind:5} {sampler:16} shift {shift:g}: calls {r['calls']:g}/{r['whole']:g} {figures} {r['why'][:1]}", flush=True
                    )
    if args.json:
        from bench.harness import machine

        args.json.write_text(json.dumps({"machine": machine(), "seeds": SEEDS, "steps": STEPS, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
