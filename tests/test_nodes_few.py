"""Preset few in ComfyUI: every second step from the fourth on follows a line, be it the last."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tqai_core.metrics import nmse


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan22_5b"])
def test_every_second_step_from_the_fourth_on(host, name, steps):
    m = host.load(name)
    plain, on = host.sample(m, name, steps=steps), host.compress(m, preset="few")
    x, report = host.sample(on, name, steps=steps), host.report()
    assert [d["action"] == "forecast" for d in report["decisions"]] == [i >= 3 and i % 2 == 1 for i in range(steps)]
    assert torch.equal(x, plain) == (steps == 3)
    assert torch.equal(host.sample(host.compress(m, preset="few", enabled=False), name, steps=steps), plain)
    assert torch.equal(host.sample(m, name, steps=steps), plain), "the model itself is untouched"


@pytest.mark.parametrize("name", ["sd3", "flux", "wan22_5b"])
def test_the_last_of_four_steps_is_on_the_line_of_the_two_before(host, name):
    m, sigmas, seen = host.load(name), torch.linspace(1, 0, 5), []

    def watch(i: int, denoised: Any, x: Any, total: int) -> None:
        seen.append((x.clone(), ((x - denoised) / sigmas[i]).clone()))

    host.sample(m, name, steps=4, callback=watch)
    (_, second), (_, third), (x, fourth) = seen[1:]
    line = x - sigmas[3] * (2 * third - second)
    ours = host.sample(host.compress(m, preset="few"), name, steps=4)
    assert nmse(ours, line) < 1e-9
    assert nmse(ours, x - sigmas[3] * fourth) > 1e-7, "the exact run is another one"
