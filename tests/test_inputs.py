"""A forecast is of what the model was called with: inputs that change in the middle of a run start the history anew."""

from __future__ import annotations

import pytest
import torch

import tqai_core as tqai
from tqai_core.inputs import Inputs
from tqai_core.metrics import psnr

STEPS = 24


def test_identity_content_and_presence_are_told_and_what_is_made_anew_each_time_is_not():
    guard, text, x = Inputs(moving=("x",)), torch.randn(2, 4), lambda: torch.randn(2, 3)
    call = lambda **inputs: guard.change("cond", {"x": x(), "text": text, "fresh": torch.zeros(1), **inputs})
    assert [call(), call(), call(control=None)] == [None] * 3
    assert guard.change("uncond", {}) is None, "each branch by itself"
    assert call(text=text.clone()) == "input 'text' is another one or was changed"
    assert call(control=[torch.ones(1)]) == "input 'control' is new"
    assert call() == "input 'control' is gone"
    text += 1
    call()
    call()
    text += 1
    assert "'text'" in str(call())
    assert "another form" in str(call(x=torch.randn(1, 3)))
    assert Inputs(batched=False).change("a", {"x": x()}) is None


def other_prompt(embeds):
    """A callback that hands in another prompt from step 12 on."""

    def change(pipe, i, t, values):
        return {"prompt_embeds": embeds} if i == 11 else {}

    return change


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan"])
def test_another_prompt_in_the_middle_is_not_answered_with_the_old_one(kind, pipe_of):
    from tqai_core.hosts.diffusers import minis

    pipe = pipe_of(kind)
    tokens, _ = minis.prompts(kind, [7])
    tokens = torch.cat([minis.prompts(kind, [10])[0], tokens]) if kind == "sd3" else tokens
    inputs = minis.inputs(kind, [3]) | dict(num_inference_steps=STEPS, output_type="latent", return_dict=False)
    inputs |= dict(callback_on_step_end=other_prompt(tokens), callback_on_step_end_tensor_inputs=["prompt_embeds"])
    run = lambda **more: pipe(**inputs, generator=torch.Generator().manual_seed(0), **more)[0]
    exact = run()
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        ours, report = run(), handle.report()
        again = run()
    assert torch.equal(ours, again)
    assert [f["why"] for f in report.fallbacks if "encoder_hidden_states" in f["why"]]
    actions = [d["action"] for d in report.decisions]
    assert actions[12:15] == ["compute"] * 3, "until there is a new history"
    assert "forecast" in actions[:12]
    assert "forecast" in actions[15:]
    assert psnr(ours, exact) > 38


@pytest.mark.parametrize("step", [10, 11, 13])
def test_guidance_cut_off_in_the_middle(step, pipe_of):
    """diffusers' own callback halves the batch."""
    from diffusers.callbacks import SD3CFGCutoffCallback

    from tqai_core.hosts.diffusers import minis

    pipe = pipe_of("sd3")
    inputs = minis.inputs("sd3", [3, 8]) | dict(num_inference_steps=STEPS, output_type="latent", return_dict=False)
    cut = lambda: SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=step)
    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    run = lambda: pipe(
        **inputs, generator=torch.Generator().manual_seed(0), callback_on_step_end=cut(), callback_on_step_end_tensor_inputs=names
    )[0]
    exact = run()
    with tqai.apply(pipe, tqai.preset("balanced", "sd3")) as handle:
        ours, report = run(), handle.report()
    assert ours.shape == exact.shape, "no forecast of the old batch"
    assert [f["why"] for f in report.fallbacks if "'hidden_states' has another form" in f["why"]]
    assert report.decisions[step + 1]["action"] == "compute"
    assert report.calls_skipped >= 6
    assert psnr(ours, exact) > 40


def controlled(kind, pipe):
    """The pipeline with a ControlNet of random weights in the shape of its transformer, and the arguments that it takes."""
    import diffusers

    torch.manual_seed(0)
    model, made = pipe.transformer, dict(num_layers=1)
    if kind == "sd3":
        net = diffusers.SD3ControlNetModel.from_transformer(model, num_extra_conditioning_channels=0, **made)
    else:
        heads = {name: model.config[name] for name in ("attention_head_dim", "num_attention_heads")}
        net = diffusers.FluxControlNetModel.from_transformer(model, num_single_layers=1, **heads, **made)
    for p in net.parameters():
        if p.abs().max() == 0:  # its outputs begin as zeros
            p.data.normal_(0, 0.05)
    family = diffusers.StableDiffusion3ControlNetPipeline if kind == "sd3" else diffusers.FluxControlNetPipeline
    out = family(**pipe.components, controlnet=net.eval().requires_grad_(False))
    out.set_progress_bar_config(disable=True)
    return out


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_controlnet_that_ends_in_the_middle(kind, pipe_of, monkeypatch):
    """diffusers calls it to the end, at strength 0: its residuals are there, made anew each time, and suddenly zeros."""
    from types import SimpleNamespace

    from tqai_core.hosts.diffusers import minis

    pipe = controlled(kind, pipe_of(kind))
    pixels = lambda image: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda *seed: image[:, :1, ::8, ::8]))
    monkeypatch.setattr(pipe.vae, "encode", pixels, raising=False)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    inputs = minis.inputs(kind, [3]) | dict(num_inference_steps=STEPS, output_type="latent", return_dict=False, control_image=picture)
    run = lambda end=0.5: pipe(**inputs, control_guidance_end=end, generator=torch.Generator().manual_seed(0))[0]
    exact = run()
    assert psnr(exact, run(1.0)) < 35, "it matters where it ends"
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        ours, report = run(), handle.report()
        run(1.0)
        assert not [f for f in handle.report().fallbacks if "cond_scale" in f["why"]], "it does not change"
    assert [f["why"].split(":")[0] for f in report.fallbacks] == ["input 'cond_scale' is another one or was changed"]
    assert [d["action"] for d in report.decisions[STEPS // 2 :][:3]] == ["compute"] * 3
    assert report.calls_skipped >= 6 * report.calls // STEPS
    assert psnr(ours, exact) > 45
