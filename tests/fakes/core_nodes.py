"""The core nodes that our workflows use, on the fake host: ComfyUI's names, inputs and order, tiny work behind them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import caches_fake
import comfy_fake
import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 8  # latents are that much smaller each way: the toy models attend over all of it
SAMPLERS, SCHEDULERS = list(comfy_fake.SAMPLERS), ["simple", "sgm_uniform"]
SEED = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True})
MODELS = {
    "flux1-dev.safetensors": "flux",
    "wan2.2_ti2v_5B_fp16.safetensors": "wan22_5b",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "wan_14b_high",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "wan_14b_low",
    "flux-2-klein-9b-kv-fp8.safetensors": "klein",
}
TEXT_ENCODERS = ["clip_l.safetensors", "t5xxl_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "qwen_3_8b_fp8mixed.safetensors"]
VAES = ["ae.safetensors", "flux2-vae.safetensors", "wan2.2_vae.safetensors", "wan_2.1_vae.safetensors"]


@dataclass(frozen=True)
class Core:
    """``inputs`` in V1 form; an input of the optional ones may be missing in a prompt."""

    outputs: tuple[str, ...]
    inputs: dict[str, tuple[Any, dict[str, Any]]]
    run: Callable[..., tuple[Any, ...] | dict[str, Any]]
    optional: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    output_node: bool = False


def number(kind: str, default: float, low: float, high: float, **more: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"default": default, "min": low, "max": high, **more}


def combo(*options: str, **more: Any) -> tuple[list[str], dict[str, Any]]:
    return list(options), more


def link(kind: str) -> tuple[str, dict[str, Any]]:
    return kind, {}


def load(name: str) -> Any:
    return comfy_fake.ModelPatcher(comfy_fake.BaseModel(name))


def text(clip: Any, text: str) -> tuple[Any]:
    g = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return ([[torch.randn(1, 8, 8, generator=g), {}]],)


def shifted(model: Any, shift: float) -> tuple[Any]:
    clone = model.clone()
    clone.object_patches["model_sampling"] = type(model.model.model_sampling)(shift)
    return (clone,)


def sample(
    model: Any, seed: int, steps: int, cfg: float, sampler_name: str, positive: Any, negative: Any, latent: dict[str, Tensor],
    first: int = 0, last: int = 10_000, leftover: bool = False, noisy: bool = True, denoise: float = 1.0,
) -> tuple[Any]:  # fmt: skip
    x = latent["samples"]
    channels = comfy_fake.MODELS[model.name][1]
    if x.shape[1] != channels:  # as ComfyUI adapts an empty latent to the model
        x = torch.zeros(x.shape[0], channels, *x.shape[2:])
    sampling = model.get_model_object("model_sampling")
    whole = round(steps / denoise)
    sigmas = torch.tensor([sampling.percent_to_sigma(i / whole) for i in range(whole - steps, whole + 1)])[first : last + 1]
    if not leftover:
        sigmas[-1] = 0
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) if noisy else torch.zeros_like(x)
    if not noisy:  # the fake samplers mix noise and latent: a latent that is noisy already goes in whole
        x = x / (1 - sigmas[0])
    out = comfy_fake.sample_custom(model, noise, cfg, comfy_fake.SAMPLERS[sampler_name], sigmas, positive, negative, x, seed=seed)
    return ({"samples": out},)


def ksampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0):  # type: ignore[no-untyped-def]
    return sample(model, seed, steps, cfg, sampler_name, positive, negative, latent_image, denoise=denoise)


def ksampler_advanced(  # type: ignore[no-untyped-def]
    model, add_noise, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, start_at_step, end_at_step,
    return_with_leftover_noise,
):  # fmt: skip
    return sample(
        model, noise_seed, steps, cfg, sampler_name, positive, negative, latent_image, start_at_step, end_at_step,
        return_with_leftover_noise == "enable", add_noise == "enable",
    )  # fmt: skip


def sampler_custom(model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image):  # type: ignore[no-untyped-def]
    x = latent_image["samples"]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(noise_seed)) if add_noise else torch.zeros_like(x)
    out = comfy_fake.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, x, seed=noise_seed)
    return {"samples": out}, {"samples": out}


def flux2_sigmas(steps: int, width: int, height: int) -> tuple[Tensor]:
    t, shift = torch.linspace(1, 0, steps + 1), 1 + width * height / 2**20
    return (shift * t / (1 + (shift - 1) * t),)


def with_reference(conditioning: Any, latent: dict[str, Tensor] | None = None) -> tuple[Any]:
    """The toy model takes what stands behind its prompt as the reference."""
    more = [] if latent is None else [latent["samples"].reshape(1, -1, 8)]
    return ([[torch.cat([t, *more], 1), d] for t, d in conditioning],)


def decode(samples: dict[str, Tensor], vae: Any) -> tuple[Tensor]:
    x = samples["samples"][:, :3].movedim(1, -1)
    return (torch.sigmoid(x.reshape(-1, *x.shape[-3:])),)


def stitch(image1: Tensor, direction: str, match_image_size: bool, spacing_width: int, spacing_color: str, image2: Tensor) -> tuple[Tensor]:
    return (torch.cat([image1, F.pad(image2, (0, 0, spacing_width, 0), value=1.0)], 2),)


IMAGES: list[Tensor] = []  # what was saved or shown


def shown(images: Tensor, **kw: Any) -> dict[str, Any]:
    IMAGES.append(images)
    return {"images": [{"filename": f"{len(IMAGES) - 1}.png", "subfolder": "", "type": "temp"}]}


IMAGE_OUT = dict(outputs=("IMAGE",), output_node=True, run=shown)
SIZE = {
    "width": number("INT", 1024, 16, 16384, step=16),
    "height": number("INT", 1024, 16, 16384, step=16),
}
CORE: dict[str, Core] = {
    "UNETLoader": Core(
        ("MODEL",),
        {"unet_name": combo(*MODELS), "weight_dtype": combo("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", advanced=True)},
        lambda unet_name, weight_dtype: (load(MODELS[unet_name]),),
    ),
    "CheckpointLoaderSimple": Core(
        ("MODEL", "CLIP", "VAE"),
        {"ckpt_name": combo("sd3.5_large_fp8_scaled.safetensors")},
        lambda ckpt_name: (load("sd3"), "clip", "vae"),
    ),
    "DualCLIPLoader": Core(
        ("CLIP",),
        {
            "clip_name1": combo(*TEXT_ENCODERS),
            "clip_name2": combo(*TEXT_ENCODERS),
            "type": combo("sdxl", "sd3", "flux"),
        },
        lambda **kw: ("clip",),
        {"device": combo("default", "cpu", advanced=True)},
    ),
    "CLIPLoader": Core(
        ("CLIP",),
        {"clip_name": combo(*TEXT_ENCODERS), "type": combo("stable_diffusion", "sd3", "wan", "flux2")},
        lambda **kw: ("clip",),
        {"device": combo("default", "cpu", advanced=True)},
    ),
    "VAELoader": Core(("VAE",), {"vae_name": combo(*VAES)}, lambda vae_name: ("vae",)),
    "CLIPTextEncode": Core(
        ("CONDITIONING",), {"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": link("CLIP")}, text
    ),
    "FluxGuidance": Core(
        ("CONDITIONING",),
        {"conditioning": link("CONDITIONING"), "guidance": number("FLOAT", 3.5, 0.0, 100.0, step=0.1)},
        lambda conditioning, guidance: ([[t, {**d, "guidance": guidance}] for t, d in conditioning],),
    ),
    "ConditioningZeroOut": Core(
        ("CONDITIONING",),
        {"conditioning": link("CONDITIONING")},
        lambda conditioning: ([[torch.zeros_like(t), d] for t, d in conditioning],),
    ),
    "EmptySD3LatentImage": Core(
        ("LATENT",),
        {**SIZE, "batch_size": number("INT", 1, 1, 4096)},
        lambda width, height, batch_size: ({"samples": torch.zeros(batch_size, 16, height // SMALL // 8, width // SMALL // 8)},),
    ),
    "EmptyHunyuanLatentVideo": Core(
        ("LATENT",),
        {**SIZE, "length": number("INT", 25, 1, 16384, step=4), "batch_size": number("INT", 1, 1, 4096)},
        lambda width, height, length, batch_size: (
            {"samples": torch.zeros(batch_size, 16, (length - 1) // 4 // SMALL + 1, height // SMALL // 8, width // SMALL // 8)},
        ),
    ),
    "Wan22ImageToVideoLatent": Core(
        ("LATENT",),
        {
            "vae": link("VAE"),
            "width": number("INT", 1280, 32, 16384, step=32),
            "height": number("INT", 704, 32, 16384, step=32),
            "length": number("INT", 49, 1, 16384, step=4),
            "batch_size": number("INT", 1, 1, 4096),
        },
        lambda vae, width, height, length, batch_size, start_image=None: (
            {"samples": torch.zeros(batch_size, 48, (length - 1) // 4 // SMALL + 1, height // SMALL // 16, width // SMALL // 16)},
        ),
        {"start_image": link("IMAGE")},
    ),
    "EmptyFlux2LatentImage": Core(
        ("LATENT",),
        {**SIZE, "batch_size": number("INT", 1, 1, 4096)},
        lambda width, height, batch_size: ({"samples": torch.zeros(batch_size, 16, height // SMALL // 16, width // SMALL // 16)},),
    ),
    "LoadImage": Core(
        ("IMAGE", "MASK"),
        {"image": combo("example.png", image_upload=True)},
        lambda image: (torch.rand(1, 160, 160, 3, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 160, 160)),
    ),
    "VAEEncode": Core(
        ("LATENT",),
        {"pixels": link("IMAGE"), "vae": link("VAE")},
        lambda pixels, vae: ({"samples": F.avg_pool2d(pixels.movedim(-1, 1), 4)[:, :2]},),
    ),
    "ReferenceLatent": Core(("CONDITIONING",), {"conditioning": link("CONDITIONING")}, with_reference, {"latent": link("LATENT")}),
    "FluxKVCache": Core(("MODEL",), {"model": link("MODEL")}, lambda model: (caches_fake.flux_kv_cache(model),)),
    "Flux2Scheduler": Core(
        ("SIGMAS",),
        {"steps": number("INT", 20, 1, 4096), "width": number("INT", 1024, 16, 16384), "height": number("INT", 1024, 16, 16384)},
        flux2_sigmas,
    ),
    "KSamplerSelect": Core(("SAMPLER",), {"sampler_name": combo(*SAMPLERS)}, lambda sampler_name: (comfy_fake.SAMPLERS[sampler_name],)),
    "ModelSamplingSD3": Core(("MODEL",), {"model": link("MODEL"), "shift": number("FLOAT", 3.0, 0.0, 100.0, step=0.01)}, shifted),
    "KSampler": Core(
        ("LATENT",),
        {
            "model": link("MODEL"),
            "seed": SEED,
            "steps": number("INT", 20, 1, 10000),
            "cfg": number("FLOAT", 8.0, 0.0, 100.0, step=0.1),
            "sampler_name": combo(*SAMPLERS),
            "scheduler": combo(*SCHEDULERS),
            "positive": link("CONDITIONING"),
            "negative": link("CONDITIONING"),
            "latent_image": link("LATENT"),
            "denoise": number("FLOAT", 1.0, 0.0, 1.0, step=0.01),
        },
        ksampler,
    ),
    "KSamplerAdvanced": Core(
        ("LATENT",),
        {
            "model": link("MODEL"),
            "add_noise": combo("enable", "disable", advanced=True),
            "noise_seed": SEED,
            "steps": number("INT", 20, 1, 10000),
            "cfg": number("FLOAT", 8.0, 0.0, 100.0, step=0.1),
            "sampler_name": combo(*SAMPLERS),
            "scheduler": combo(*SCHEDULERS),
            "positive": link("CONDITIONING"),
            "negative": link("CONDITIONING"),
            "latent_image": link("LATENT"),
            "start_at_step": number("INT", 0, 0, 10000, advanced=True),
            "end_at_step": number("INT", 10000, 0, 10000, advanced=True),
            "return_with_leftover_noise": combo("disable", "enable", advanced=True),
        },
        ksampler_advanced,
    ),
    "SamplerCustom": Core(
        ("LATENT", "LATENT"),
        {
            "model": link("MODEL"),
            "add_noise": ("BOOLEAN", {"default": True}),
            "noise_seed": SEED,
            "cfg": number("FLOAT", 8.0, 0.0, 100.0, step=0.1),
            "positive": link("CONDITIONING"),
            "negative": link("CONDITIONING"),
            "sampler": link("SAMPLER"),
            "sigmas": link("SIGMAS"),
            "latent_image": link("LATENT"),
        },
        sampler_custom,
    ),
    "VAEDecode": Core(("IMAGE",), {"samples": link("LATENT"), "vae": link("VAE")}, decode),
    "SaveImage": Core(inputs={"images": link("IMAGE"), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, **IMAGE_OUT),
    "PreviewImage": Core(inputs={"images": link("IMAGE")}, **IMAGE_OUT),
    "SaveAnimatedWEBP": Core(
        inputs={
            "images": link("IMAGE"),
            "filename_prefix": ("STRING", {"default": "ComfyUI"}),
            "fps": number("FLOAT", 6.0, 0.01, 1000.0, step=0.01),
            "lossless": ("BOOLEAN", {"default": True}),
            "quality": number("INT", 80, 0, 100),
            "method": combo("default", "fastest", "slowest"),
        },
        **IMAGE_OUT,
    ),
    "ImageStitch": Core(
        ("IMAGE",),
        {
            "image1": link("IMAGE"),
            "direction": combo("right", "down", "left", "up", default="right"),
            "match_image_size": ("BOOLEAN", {"default": True}),
            "spacing_width": number("INT", 0, 0, 1024, step=2, advanced=True),
            "spacing_color": combo("white", "black", "red", "green", "blue", default="white", advanced=True),
        },
        stitch,
        {"image2": link("IMAGE")},
    ),
    "PreviewAny": Core(("STRING",), {"source": ("*", {})}, lambda source: {"text": [str(source)]}, output_node=True),
}
