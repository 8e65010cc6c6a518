from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tqai_core import minis
from tqai_core.hosts.diffusers.minis import pixels
from tqai_core.minis import digits

FOLDER = Path(minis.__file__).parent
LIMITS = {"flux": 4, "sd3": 10, "wan": 4, "z_image": 4}
NEEDED = {"flux": 0.98, "sd3": 0.98, "wan": 0.75, "z_image": 0.98}
ALL = (*minis.KINDS, *minis.UNTUNED)


@pytest.mark.parametrize("kind", ALL)
def test_size_and_training_log(kind):
    assert (FOLDER / f"{kind}.safetensors").stat().st_size <= LIMITS[kind] * 1e6
    log = json.loads((FOLDER / f"{kind}.json").read_text())
    assert log["kind"] == kind
    assert log["loss"][-1][1] < log["loss"][0][1] / 2, "it learnt"
    assert log["accuracy"][-1][1] >= NEEDED[kind]


@pytest.mark.parametrize("kind, count", [("flux", 100), ("sd3", 100), ("wan", 10), ("z_image", 50)])
def test_samples_are_read_as_what_was_asked(kind, count):
    pipe = minis.pipeline(kind)
    labels = [i % 10 for i in range(count)]
    g = torch.Generator().manual_seed(1)
    out = pipe(**minis.inputs(kind, labels), num_inference_steps=16, generator=g, output_type="latent", return_dict=False)[0]
    assert digits.accuracy(pixels(kind, out), torch.tensor(labels)) >= NEEDED[kind]


def test_the_judge_knows_real_digits_and_rejects_noise():
    x, y = digits.images()
    assert digits.accuracy(x[1400:], y[1400:]) > 0.95
    assert digits.accuracy(torch.randn(200, 1, 16, 16), torch.arange(200) % 10) < 0.3
    clips, labels = digits.clips(20, seed=11)
    assert clips.shape == (20, 1, 9, 16, 16)
    assert digits.accuracy(clips, labels) > 0.9


@pytest.mark.parametrize("kind", ALL)
def test_the_pipeline_gives_pictures(kind):
    pipe = minis.pipeline(kind)
    out = pipe(**minis.inputs(kind, [7]), num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    if kind == "wan":
        assert out.frames[0].shape == (33, 128, 128, 3)
    else:
        assert out.images[0].size == (128, 128)


def test_bad_input():
    with pytest.raises(ValueError, match="flux, sd3, wan, z_image"):
        minis.pipeline("sdxl")
    with pytest.raises(ValueError, match="numbers from 0 to 9"):
        minis.inputs("flux", [11])
