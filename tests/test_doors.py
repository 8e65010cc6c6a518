"""One matrix over every host, level and family: how close is the run with tqai to the exact run?

Finite, counted and "not equal" are no test of a forecast. Each bound here is a figure of the same session: what the exact
sampler loses with as many steps as model calls were run, plain reuse at the same calls, or the same pipeline in another host.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tqai_core as tqai
from tqai_core import minis
from tqai_core.hosts.diffusers.minis import pixels
from tqai_core.metrics import nmse

KINDS = ("flux", "sd3", "wan")
LABELS = {"flux": [0, 1], "sd3": [0, 1], "wan": [1]}
STEPS = {"flux": 16, "sd3": 16, "wan": 24}  # a straight line through WAN's attention outputs needs small steps
HALF = "fixed:interval=2"  # forecasts every second step between the first three and the last
WINDOW = "window:density=0.3"
AGREE = 1.5  # how much farther from exact one host may be than another: layouts of latents differ, and so do the codec's vectors


class Run(NamedTuple):
    latents: torch.Tensor
    error: float  # NMSE to the exact run of the same host
    skipped: float  # part of the model calls
    fallbacks: list[dict[str, str]]


class Doors:
    """Runs of both hosts by configuration, each made once. The same weights, noise, prompts and sigmas in both."""

    def __init__(self, host) -> None:
        import minis_fake

        self.host, self.fake = host, minis_fake
        self.pipe, self.patcher, self.run = cache(minis.pipeline), cache(minis_fake.load), cache(self.run)

    def noise(self, kind: str) -> torch.Tensor:
        shape = (1, 9, 16, 16) if kind == "wan" else (1, 16, 16)
        return torch.randn(len(LABELS[kind]), *shape, generator=torch.Generator().manual_seed(0))

    def run(self, door: str, kind: str, config: tqai.Config | None = None, steps: int = 0) -> Run:
        latents, report = getattr(self, door)(kind, config, steps or STEPS[kind])
        exact = self.run(door, kind).latents if config or steps else None
        skipped = report["calls_skipped"] / report["calls"] if report else 0.0
        return Run(latents, 0.0 if exact is None else nmse(latents, exact), skipped, report["fallbacks"] if report else [])

    def sigmas(self, kind: str, steps: int) -> torch.Tensor:
        """The grid on which the pipeline samples: Flux names its sigmas, the others leave them to their scheduler."""
        scheduler = self.pipe(kind).scheduler
        named = torch.linspace(1, 1 / steps, steps).tolist() if kind == "flux" else None
        scheduler.set_timesteps(None if named else steps, sigmas=named)
        return scheduler.sigmas

    def diffusers(self, kind, config, steps):
        pipe, noise = self.pipe(kind), self.noise(kind)
        noise = pipe._pack_latents(noise, len(noise), 1, 16, 16) if kind == "flux" else noise
        kw = dict(minis.inputs(kind, LABELS[kind], 2.0), num_inference_steps=steps, latents=noise, output_type="latent", return_dict=False)
        if config is None:
            return pixels(kind, pipe(**kw)[0]), None
        with tqai.apply(pipe, config) as handle:
            out = pipe(**kw)[0]
            return pixels(kind, out), handle.report().to_dict()

    def comfyui(self, kind, config, steps):
        model = self.patcher(kind)
        if config is not None:
            stages = self.host.part("nodes.pipeline").Pipeline.of(config)
            model = self.host.compress(model, stages, level=config.level)
        prompts = {"positive": self.fake.conds(kind, LABELS[kind]), "negative": self.fake.conds(kind, [10] * len(LABELS[kind]))}
        sigmas = self.sigmas(kind, steps)
        latents = self.host.sample(model, kind, cfg=2.0, sigmas=sigmas, noise=self.noise(kind), **prompts)
        return latents, None if config is None else self.host.report()


@pytest.fixture(scope="module")
def doors(host) -> Doors:
    return Doors(host)


fake_host = pytest.mark.parametrize("host", ["0.33.0"], indirect=True)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_door = pytest.mark.parametrize("door", ["diffusers", "comfyui"])


def config(level: str, strategy: str = "delta2", monitor: str = HALF) -> tqai.Config:
    return tqai.Config(level=level, strategy=strategy, monitor=monitor)


def fewer(doors: Doors, kind: str, skipped: float) -> float:
    """Error of the exact sampler with as many steps as a run that skips this part of its calls."""
    return doors.run("diffusers", kind, None, round(STEPS[kind] * (1 - skipped))).error


@fake_host
@every_kind
def test_both_hosts_run_the_same_model(kind, doors):
    assert nmse(doors.run("comfyui", kind).latents, doors.run("diffusers", kind).latents) < 1e-10


@fake_host
@every_kind
@pytest.mark.parametrize("level, strategy", [("model", "delta2"), ("block", "delta2"), ("attention", "delta2"), ("attention", WINDOW)])
def test_every_level_is_close_to_the_exact_run_in_every_host(kind, level, strategy, doors):
    """In diffusers closer than Euler with as many steps as the model was called, and than plain reuse at the same calls; in
    ComfyUI as close as in diffusers."""
    asked = config(level, strategy)
    here, there = doors.run("diffusers", kind, asked), doors.run("comfyui", kind, asked)
    reuse = doors.run("diffusers", kind, config(level, "delta"))
    assert here.skipped == there.skipped == reuse.skipped > 0.3
    assert 0 < here.error < min(fewer(doors, kind, here.skipped), reuse.error)
    assert 0 < there.error < AGREE * here.error
    said = [f["why"] for f in there.fallbacks + here.fallbacks]
    assert all("cross-attention" in why for why in said), "in WAN, which has no window there"
    assert bool(said) == ((kind, strategy) == ("wan", WINDOW))


@fake_host
@every_kind
@every_door
def test_at_level_model_a_straight_line_beats_reuse_and_the_correction_helps(door, kind, doors):
    on, off = (doors.run(door, kind, config("model", f"delta2:correct={correct}")) for correct in ("true", "false"))
    reuse = doors.run(door, kind, config("model", "delta"))
    assert on.skipped == off.skipped == reuse.skipped > 0.3
    assert on.error < off.error < reuse.error


@fake_host
@every_kind
def test_a_preset_skips_alike_in_both_hosts(kind, doors):
    preset = tqai.preset("balanced", kind)
    here, there = doors.run("diffusers", kind, preset), doors.run("comfyui", kind, preset)
    assert abs(here.skipped - there.skipped) <= 1 / STEPS[kind]
    assert there.skipped > 0.3
    assert there.error < AGREE * here.error or there.skipped > here.skipped
    assert max(here.error, there.error) < fewer(doors, kind, here.skipped)


@fake_host
@pytest.mark.parametrize("kind", ["flux", "wan"])  # SD3's pipeline runs both branches in one call
def test_forecast_guidance_is_closer_than_a_sampler_of_the_same_calls(kind, doors):
    """cfg=difference, which ComfyUI has not: on half of the computed steps the unconditional branch is forecast as well."""
    plain, spared = (
        doors.run("diffusers", kind, config("model", strategy)) for strategy in ("delta2:correct=false", "delta2:cfg=difference")
    )
    assert spared.skipped > plain.skipped + 1 / STEPS[kind]
    assert spared.error < fewer(doors, kind, spared.skipped)


# --- language models: KL of the next token to the exact cache ------------------------------------------------------------
FIRST, PIECE, LENGTH = 768, 64, 1024
SINK, RECENT = 4, 32
METHODS = {
    "plain": {},
    "delta": {"strategy": "delta"},
    "tiered": {"scorer": "palm", "strategy": "tiered"},
    "window": {"strategy": "window"},
}


def cache_config(bits: int, method: str = "plain") -> tqai.Config:
    return tqai.Config(level="kv", codec=f"turbo:bits={bits}", sink=SINK, recent=RECENT, calibrate=64, **METHODS[method])


def divergence(logits: torch.Tensor, exact: torch.Tensor) -> float:
    terms = F.kl_div(logits.double().log_softmax(-1), exact.double().log_softmax(-1), reduction="none", log_target=True)
    return float(terms.sum(-1).mean())


class Language:
    def __init__(self) -> None:
        self.model, self.ids = minis.lm(), minis.lm_text()[None, :LENGTH]
        with torch.inference_mode():
            self.exact = self.model(self.ids).logits[:, FIRST:]
            i = torch.arange(LENGTH)
            seen = (i <= i[:, None]) & ((i < SINK) | (i > i[:, None] - RECENT - PIECE))
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            self.dropped = divergence(self.model(self.ids, attention_mask=mask).logits[:, FIRST:], self.exact)
        self.run = cache(self.run)

    def run(self, bits: int, method: str = "plain") -> float:
        with tqai.apply(self.model, cache_config(bits, method)) as handle, torch.inference_mode():
            held = handle.cache()
            self.model(self.ids[:, :FIRST], past_key_values=held)
            pieces = self.ids[:, FIRST:].split(PIECE, dim=1)
            return divergence(torch.cat([self.model(x, past_key_values=held).logits for x in pieces], dim=1), self.exact)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


def test_packed_rows_are_closer_than_no_rows_and_more_bits_are_closer(language):
    """No rows: attention to the sinks and the recent tokens alone, which is what the rows are held for."""
    four, eight = language.run(4), language.run(8)
    assert 0 < eight < four / 8, "4 bits more are 24 dB"
    assert four < language.run(2) / 4
    assert four < language.dropped / 8


@pytest.mark.parametrize("method", ["delta", "tiered"])
def test_methods_of_the_cache_are_as_close_as_the_plain_one(method, language):
    assert 0 < language.run(4, method) < AGREE * language.run(4)


def test_a_window_with_its_far_field_is_closer_than_a_window_alone(language):
    assert language.run(4) < language.run(4, "window") < language.dropped / 2


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed: make test-mlx")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_is_as_close_as_transformers(bits, language):
    import mlx.core as mx
    import numpy as np

    from tqai_core.hosts import mlx as mlx_host

    model, ids = mlx_host.mini(), mx.array(language.ids.numpy())
    held = mlx_host.make_prompt_cache(model, cache_config(bits))
    mx.eval(model(ids[:, :FIRST], cache=held))
    logits = mx.concatenate([model(ids[:, at : at + PIECE], cache=held) for at in range(FIRST, LENGTH, PIECE)], axis=1)
    assert 0 < divergence(torch.tensor(np.array(logits)), language.exact) < AGREE * language.run(bits)
