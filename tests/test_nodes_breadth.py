"""Everything that ComfyUI samples, with small random weights: on the first real checkout of test_comfyui.py.

A flow must come out closer than fewer steps of as many model calls; what is no flow must stay exact, and the report says why.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import setups
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif("TQAI_BREADTH" not in os.environ, reason="needs a real ComfyUI (test_comfyui.py)")
STEPS = 24
NO_FLOWS = {"SD1.5": "EPS", "SDXL": "EPS", "PixArt Sigma": "EPS", "WAN FlowRVS": "IMG_TO_IMG_FLOW"}


@pytest.fixture(scope="module")
def rows():
    """Rows by name, written when all are through."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    Path(os.environ["TQAI_BREADTH"]).write_text(json.dumps(found, indent=1) + "\n")


def draw(model: Any, setup: setups.Setup, steps: int = STEPS) -> Tensor:
    """All streams of the latent (video, audio), flat."""
    import comfy.nested_tensor
    import comfy.sample

    noise = setup.noise()
    nested = getattr(noise, "is_nested", False)
    start = comfy.nested_tensor.NestedTensor([torch.zeros_like(x) for x in noise.unbind()]) if nested else torch.zeros_like(noise)
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, steps, 3.0, "euler", "simple", setup.conds(1), setup.conds(2), start, denoise=1.0, seed=0, disable_pbar=True
        )
    return torch.cat([x.flatten().float() for x in (out.unbind() if nested else [out])])


def error(x: Tensor, exact: Tensor) -> float:
    """Relative L2."""
    return float((x - exact).norm() / exact.norm())


def forecasts(report: dict[str, Any]) -> int:
    return sum(d["action"] == "forecast" for d in report["decisions"])


@pytest.mark.parametrize("name", setups.SETUPS)
def test_level_model(host, name, rows):
    """Off it is the very model; a second run is the same bit for bit."""
    setup = setups.SETUPS[name]()
    m = setup.model()
    plain = draw(m, setup)
    assert torch.isfinite(plain).all()
    assert host.compress(m, enabled=False) is m
    on = host.compress(m)
    ours, report = draw(on, setup), host.report()
    assert torch.equal(draw(on, setup), ours), "a second run differs"
    count = forecasts(report)
    why = sorted({f["why"] for f in report["fallbacks"]})
    row = {"class": type(m.model.diffusion_model).__name__, "forecast": count, "of": report["evaluations"], "why": why}
    levels = list(host.part("nodes.patch").kind_of(m).levels)
    rows[name] = row | {"error": error(ours, plain) if count else None, "fewer": None, "levels": levels}
    assert report["evaluations"] == STEPS
    if name in NO_FLOWS:
        assert torch.equal(ours, plain)
        assert len(why) == 1
        assert "no flow-matching model" in why[0]
        assert NO_FLOWS[name] in why[0]
        assert "BaseModel" not in why[0]
        return
    assert why == []
    assert count >= 6
    rows[name]["fewer"] = error(draw(m, setup, STEPS - count), plain)
    assert rows[name]["error"] < rows[name]["fewer"]


LEVELS = {
    "block": ("Flux.1 dev", "Flux.2 dev", "Chroma", "Qwen-Image", "HunyuanImage 2.1", "SD3.5", "AuraFlow", "HunyuanVideo",
              "HunyuanVideo 1.5", "LTX-Video", "LTX-2", "MiniMax-H3", "WAN 2.1"),
    "attention": ("Lumina2", "Z-Image", "Cosmos-Predict2", "Krea 2", "Kandinsky 5"),
}  # fmt: skip
LEVELS["attention"] += LEVELS["block"]


@pytest.mark.parametrize(("level", "name"), [(level, name) for level, names in LEVELS.items() for name in names])
def test_levels_below(host, level, name):
    """Every second step forecast whatever the error: closer than plain reuse at the same steps; with nothing forecast, bit-exact."""
    setup = setups.SETUPS[name]()
    m = setup.model()
    few = 16
    plain, errors, counts = draw(m, setup, few), {}, {}
    monitor = {"monitor": "fixed", "min_steps": few}
    for strategy in ("delta2", "delta"):
        made = host.run("TQAIMonitor", monitor=monitor, pipeline=host.run("TQAIStrategy", strategy={"strategy": strategy}).result[0])
        errors[strategy] = error(draw(host.compress(m, made.result[0], level=level), setup, few), plain)
        report = host.report()
        counts[strategy] = report["calls_skipped"]
    assert counts["delta"] == counts["delta2"] > 0
    blocks = {site.split("/")[1] for site, s in report["per_site"].items() if s["skipped"]}
    assert blocks >= {f"{'block' if level == 'block' else 'attn'}.{i}" for i in range(2)}, "a block was left out"
    assert errors["delta2"] < errors["delta"]
    exact = host.pipeline("lyapunov", tau=1e-9)
    assert torch.equal(draw(host.compress(m, exact, level=level), setup, few), plain)
