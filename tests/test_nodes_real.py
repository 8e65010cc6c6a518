"""Beside ComfyUI's own nodes, and with the trained minis: on a real checkout only (see test_comfyui.py)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif("TQAI_COMFYUI" not in os.environ, reason="needs a real ComfyUI")
KINDS = ("flux", "sd3", "wan")
LABELS = {"flux": [0, 1, 2, 3, 4], "sd3": [0, 1, 2, 3, 4], "wan": [1, 7]}
STEPS = 24


def forecasts(report: dict[str, Any]) -> int:
    return sum(d["action"] == "forecast" for d in report["decisions"])


@pytest.fixture(scope="module")
def mini(host):
    """A trained mini with the plain schedule it was trained for, and a sampler of digits."""
    import convert
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    def load(kind: str) -> Any:
        m = host.load(f"mini_{kind}")
        return m if kind == "flux" else ModelSamplingSD3().patch(m, 1.0, 1000)[0]

    def conds(kind: str, labels: list[int]) -> Any:
        text, pooled = convert.conditioning(kind, labels)
        return [[text, {} if pooled is None else {"pooled_output": pooled}]]

    def noise(kind: str, count: int, seed: int = 0) -> torch.Tensor:
        shape = (16, 9, 16, 16) if kind == "wan" else (16, 16, 16)
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))

    def draw(
        m: Any, kind: str, seed: int = 0, steps: int = STEPS, cfg: float = 2.0, labels: list[int] | None = None, sigmas: Any = None
    ) -> torch.Tensor:  # fmt: skip
        labels = LABELS[kind] if labels is None else labels
        latents = host.sample(
            m, f"mini_{kind}", steps=steps, cfg=cfg, positive=conds(kind, labels), negative=conds(kind, [10] * len(labels)),
            noise=noise(kind, len(labels), seed), sigmas=sigmas,
        )  # fmt: skip
        return latents[:, :1]  # the other channels are padding

    load.draw, load.noise = draw, noise
    return load


@pytest.mark.parametrize("kind", KINDS)
def test_minis_draw_their_digits_as_well_as_in_diffusers(host, mini, kind):
    """Same weights, noise and schedule in both doors: the digits, the calls and the PSNR agree."""
    import tqai_core as tqai
    from tqai_core import minis
    from tqai_core.metrics import psnr
    from tqai_core.minis import digits

    labels = LABELS[kind]
    m, pipe = mini(kind), minis.pipeline(kind)
    pipe(**minis.inputs(kind, labels, 2.0), num_inference_steps=STEPS, output_type="latent")  # sets the pipeline's own schedule
    sigmas = pipe.scheduler.sigmas.clone()
    plain = mini.draw(m, kind, sigmas=sigmas)
    read = digits.read(plain)
    wanted = torch.tensor(labels).repeat_interleave(9 if kind == "wan" else 1)
    assert (read == wanted).float().mean() >= (0.8 if kind == "wan" else 1.0)
    on = host.compress(m)
    ours, report = mini.draw(on, kind, sigmas=sigmas), host.report()
    start = mini.noise(kind, len(labels))[:, :1]
    if kind == "flux":
        start = pipe._pack_latents(start, len(labels), 1, 16, 16)

    def theirs() -> torch.Tensor:
        from tqai_core.adapters.minis import pixels

        out = pipe(
            **minis.inputs(kind, labels, 2.0), num_inference_steps=STEPS, latents=start, output_type="latent", return_dict=False
        )[0]  # fmt: skip
        return pixels(kind, out.float())

    exact = theirs()
    assert psnr(plain, exact) > 60, "the converted mini is not the same model"
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        other = theirs()
        there = handle.report()
    here, reference = psnr(ours, plain), psnr(other, exact)
    there_share, here_share = there.calls_skipped / there.calls, report["calls_skipped"] / report["calls"]
    told = f"{here:.2f} dB, {here_share:.0%} skipped"
    print(f"\n{kind}, {host.version}: {told}; diffusers door {reference:.2f} dB, {there_share:.0%} skipped")
    assert abs(here - reference) <= 1.0 or here > reference
    assert abs(here_share - there_share) <= 2.5 / STEPS
    assert (digits.read(ours) == read).float().mean() >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_overhead_of_skipping_nothing(host, mini, kind):
    """CPU time of a run that computes every step and keeps its memory, against the plain model: interleaved, medians.

    The minis are the worst case: their steps take milliseconds and ComfyUI's 16 channels make their latents 16 times as
    large as they are. Coding these costs more than 2 % of such a step; keeping uncoded copies shows what is left of us.
    """
    m = mini(kind)
    always = host.pipeline("lyapunov", tau=0.0)
    coded = host.compress(m, always)
    copied = host.compress(m, always, codec={"codec": "exact"})
    ratios = []
    for turn in range(6):
        took = []
        for which in (m, coded, copied):
            began = time.process_time()
            mini.draw(which, kind, labels=[3], steps=16)
            took.append(time.process_time() - began)
        if turn:
            ratios.append((took[1] / took[0], took[2] / took[0]))
    coding, copying = (sorted(r)[len(ratios) // 2] for r in zip(*ratios, strict=True))
    print(f"\n{kind}, {host.version}: overhead {100 * (coding - 1):+.1f} % coded, {100 * (copying - 1):+.1f} % as copies")
    assert copying < 1.25
    assert coding < 1.75


def test_core_easycache_switches_us_off(host):
    from comfy_extras.nodes_easycache import EasyCacheNode

    m = host.load("wan22_5b")
    both = EasyCacheNode.execute(host.compress(m, host.pipeline()), 50.0, 0.0, 0.99, False).result[0]
    alone = EasyCacheNode.execute(m, 50.0, 0.0, 0.99, False).result[0]
    assert torch.equal(host.sample(both, "wan22_5b"), host.sample(alone, "wan22_5b"))
    assert "EasyCache" in host.report()["fallbacks"][0]["why"]


def test_core_skip_layer_guidance(host):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    m = SkipLayerGuidanceDiT.execute(host.load("sd3"), 3.0, 0.0, 0.5, "1", "").result[0]
    x = host.sample(host.compress(m, host.pipeline()), "sd3")
    report = host.report()
    assert torch.isfinite(x).all()
    assert forecasts(report) >= 6
    assert report["per_site"]["sd3/model/cond#2/out"]["calls"] < report["per_site"]["sd3/model/cond/out"]["calls"]


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_core_context_windows(host, schedule):
    """Windows that stay have a history each; windows that move have none, so everything is computed."""
    import inspect

    from comfy_extras import nodes_context_windows as nodes

    execute = nodes.ContextWindowsManualNode.execute
    wanted = dict(
        context_length=2, context_overlap=1, context_schedule=schedule, context_stride=1, closed_loop=False, dim=2, freenoise=False,
        fuse_method="pyramid",
    )  # fmt: skip
    known = inspect.signature(execute).parameters
    m = execute(host.load("wan_14b_high"), **{k: v for k, v in wanted.items() if k in known}).result[0]
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = host.sample(m, "wan_14b_high", noise=noise)
    x = host.sample(host.compress(m, host.pipeline()), "wan_14b_high", noise=noise)
    report = host.report()
    assert torch.isfinite(x).all()
    if schedule == "standard_static":
        assert forecasts(report) >= 7
        assert sum(site.startswith("wan/model/cond@") for site in report["per_site"]) >= 3
    elif forecasts(report) == 0:
        assert torch.equal(x, plain)


def test_core_torch_compile(host):
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    m = host.load("sd3").clone()
    set_torch_compile_wrapper(m, backend="eager")
    plain = host.sample(m, "sd3")
    on = host.compress(m, host.pipeline())
    torch._dynamo.utils.counters.clear()
    x = host.sample(on, "sd3")
    assert torch.isfinite(x).all()
    assert forecasts(host.report()) >= 7
    assert x.shape == plain.shape
    off = host.compress(m, host.pipeline("lyapunov", tau=0.0))
    assert torch.equal(host.sample(off, "sd3"), plain)


def test_lora_after_us(host):
    m = host.load("sd3")
    on = host.compress(m, host.pipeline())
    before = host.sample(on, "sd3")
    lora = on.clone()
    key = next(k for k in lora.model.state_dict() if k.endswith("joint_blocks.0.x_block.attn.qkv.weight"))
    diff = 0.05 * torch.randn(lora.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(0))
    lora.add_patches({key: ("diff", (diff,))}, 1.0)
    after, report = host.sample(lora, "sd3"), host.report()
    assert not torch.equal(after, before)
    assert forecasts(report) >= 7
    assert torch.equal(host.sample(on, "sd3"), before)


def test_another_node_that_replaces_attention(host):
    """Level model does not touch attention, so a replaced one changes nothing for us."""
    m = host.load("flux").clone()
    m.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    assert torch.equal(
        host.sample(host.compress(m, host.pipeline()), "flux"), host.sample(host.compress(host.load("flux"), host.pipeline()), "flux")
    )
    assert forecasts(host.report()) >= 7


def test_no_tensor_outlives_a_run(host):
    """Counted over everything that the garbage collector knows, not over what we think we hold."""

    def alive() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)

    m = host.load("sd3")
    on = host.compress(m, host.pipeline())
    host.sample(on, "sd3")
    before = alive()
    for _ in range(3):
        host.sample(on, "sd3")
    assert alive() <= before


def test_import_is_quick_and_quiet(tmp_path):
    code = """
import sys, time
sys.path.insert(0, sys.argv[1]); root = sys.argv[2]; sys.argv = ["main.py", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import utils.install_util, comfy.sd, comfy.samplers, comfy_api.latest, folder_paths, PIL.ImageDraw, importlib.util
began = time.process_time()
spec = importlib.util.spec_from_file_location("tqai_pack", root + "/__init__.py", submodule_search_locations=[root])
pack = sys.modules["tqai_pack"] = importlib.util.module_from_spec(spec); spec.loader.exec_module(pack)
for cls in pack.NODE_CLASS_MAPPINGS.values(): cls.INPUT_TYPES()
print("TOOK", time.process_time() - began)
"""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, os.environ["TQAI_COMFYUI"], str(root)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = run.stdout.partition("TOOK")
    took = float(said[2])
    print(f"\nimport of the pack: {took:.2f} s of CPU time")
    assert took < 0.3
    assert "tqai" not in run.stderr
