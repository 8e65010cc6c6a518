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
    """Off, a second run and the model without the node: bit-exact."""
    setup = setups.SETUPS[name]()
    m = setup.model()
    plain = draw(m, setup)
    assert torch.isfinite(plain).all()
    assert torch.equal(draw(host.compress(m, enabled=False), setup), plain)
    on = host.compress(m)
    ours, report = draw(on, setup), host.report()
    assert torch.equal(draw(on, setup), ours), "a second run differs"
    assert torch.equal(draw(m, setup), plain), "the model without the node changed"
    count = forecasts(report)
    why = sorted({f["why"] for f in report["fallbacks"]})
    row = {"class": type(m.model.diffusion_model).__name__, "forecast": count, "of": report["evaluations"], "why": why}
    rows[name] = row | {"error": error(ours, plain) if count else None, "fewer": None, "levels": {}}
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
