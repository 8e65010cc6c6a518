"""Things that people have around a model, and tqai beside them: what docs/compatibility.md names and no other file tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tqai_core as tqai
from tqai_core.metrics import nmse, psnr

HALF = tqai.Config(monitor="fixed:interval=2,min_steps=4")  # a random net moves too wildly for error control to skip
COMPUTED = tqai.Config(monitor="fixed:interval=1,min_steps=1")


@pytest.fixture(scope="module")
def sd3(picture_folder):
    from tqai_core.hosts.diffusers.load import pipeline

    pipe = pipeline(picture_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- pipelines that begin with a picture


def from_picture(sd3, name):
    """The image-to-image or the inpainting pipeline of SD3 on the parts of ``sd3``, and its call."""
    import diffusers

    parts = dict(sd3.components)
    if "Inpaint" in name:  # it wants latents of 16 channels
        torch.manual_seed(0)
        parts["transformer"] = type(sd3.transformer).from_config({**sd3.transformer.config, "in_channels": 16, "out_channels": 16}).eval()
        parts["vae"] = type(sd3.vae).from_config({**sd3.vae.config, "latent_channels": 16}).eval()
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    given = {"image": picture, "strength": 0.8, "height": 64, "width": 64, "prompt": "a cat", "num_inference_steps": 24}
    if "Inpaint" in name:
        given["mask_image"] = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
    return pipe, lambda: pipe(**given, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"])
def test_a_picture_to_begin_with(name, sd3):
    pipe, call = from_picture(sd3, name)
    exact = call()
    with tqai.apply(pipe, HALF) as handle:
        ours = call()
        report = handle.report()
    assert report.calls_skipped >= 6
    assert psnr(ours, exact) > 25
    with tqai.apply(pipe, COMPUTED):
        assert torch.equal(call(), exact)
    assert torch.equal(call(), exact), "removed"


# -- weights in fewer bits


def text_to_picture(pipe, steps=24):
    given = {"prompt": "a cat", "num_inference_steps": steps, "height": 64, "width": 64, "output_type": "latent"}
    return pipe(**given, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("how", ["fp8 storage", "int8 linear"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_quantised_weights_of_a_pipeline(how, order, picture_folder):
    """diffusers' own fp8 storage (layerwise casting) and torch's int8 linear layers, made before tqai comes or after."""
    from tqai_core.hosts.diffusers.load import pipeline

    pipe = pipeline(picture_folder)
    pipe.set_progress_bar_config(disable=True)
    plain = text_to_picture(pipe)

    def quantise():
        if how == "fp8 storage":
            pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        else:
            torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8, inplace=True)

    if order == "before":
        quantise()
        exact = text_to_picture(pipe)
        assert not torch.equal(exact, plain)
    handle = tqai.apply(pipe, HALF)
    if order == "after":
        quantise()
    ours = text_to_picture(pipe)
    assert handle.report().calls_skipped >= 9
    handle.remove()
    if order == "after":
        exact = text_to_picture(pipe)
    assert torch.equal(text_to_picture(pipe), exact)
    assert psnr(ours, exact) > 25
    with tqai.apply(pipe, COMPUTED):
        assert torch.equal(text_to_picture(pipe), exact), "the weights are those of the quantised model"


# -- language models


@pytest.fixture
def lm(lm_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(lm_folder).eval()


IDS = torch.randint(3, 250, (1, 300), generator=torch.Generator().manual_seed(0))


def write(lm, cache=None, **over):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS), **over}
    return lm.generate(IDS, past_key_values=cache, **options)


def logits(lm, cache):
    return lm(IDS, past_key_values=cache).logits[0, -1].float()


def lora(lm):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    lm.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False))


def int8(lm):
    torch.ao.quantization.quantize_dynamic(lm, {nn.Linear}, dtype=torch.qint8, inplace=True)


def offload(lm):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(lm, execution_device=torch.device("cpu"))


def compiled(lm):
    lm.model.layers[0].compile(backend="eager")


CHANGES = [lora, int8, offload, pytest.param(compiled, marks=pytest.mark.slow)]  # the compiler takes long to come


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_language_model_keeps_its_own_tokens(change, order, lm):
    """The change is made before tqai comes or after. An exact cache gives the changed model's tokens, a packed one stays close to it."""
    plain = write(lm)
    if order == "before":
        change(lm)
    with torch.no_grad():
        handle = tqai.apply(lm, tqai.Config(level="kv", codec="exact"))
        if order == "after":
            change(lm)
        ours = write(lm, handle.cache())
        handle.remove()
        assert torch.equal(ours, write(lm)), "the tokens of the changed model"
        if change in (offload, compiled):
            assert torch.equal(ours, plain)
        exact = logits(lm, None)
        with tqai.apply(lm, tqai.preset("k8v4")) as handle:
            assert nmse(logits(lm, handle.cache()), exact) < 1e-2
            assert write(lm, cache := handle.cache()).shape == ours.shape
            assert min(layer["tokens_packed"] for layer in cache.report().per_site.values()) > 100


def test_guidance_in_text_has_a_cache_of_its_own(lm):
    """``guidance_scale`` of generate runs the negative prompt through a second cache, which is its own."""
    negative = IDS[:, -40:]
    given = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    exact = write(lm, **given)
    assert not torch.equal(exact, write(lm)), "guidance changes the text"
    with tqai.apply(lm, tqai.Config(level="kv", codec="exact")) as handle:
        assert torch.equal(write(lm, handle.cache(), **given), exact)
