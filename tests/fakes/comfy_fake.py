"""A small ComfyUI: the dozen host calls that the nodes rely on, so that their tests run where no ComfyUI is.

Two profiles, the oldest and the newest supported host. Each test that runs here runs on real checkouts too (COMFYUI_PATH),
which keeps this one honest.
"""

from __future__ import annotations

import importlib.machinery
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import caches_fake
import comfy_api_fake
import torch
from torch import Tensor, nn

PROFILES = ("0.15.1", "0.33.0")


# --- comfy.patcher_extension -------------------------------------------------------------------------------------------
class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    PREDICT_NOISE = "predict_noise"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


@dataclass
class Executor:
    """Calls the next wrapper or, after the last one, the wrapped function."""

    original: Callable[..., Any]
    class_obj: Any
    wrappers: list[Callable[..., Any]]

    def __call__(self, *args: Any, **kw: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kw)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kw)


def copied(d: Any) -> Any:
    """Dicts and lists are copied, everything else is shared: what clone() and every forward do."""
    if isinstance(d, dict):
        return {k: copied(v) for k, v in d.items()}
    return [copied(v) for v in d] if isinstance(d, list) else d


def wrapped(kind: str, options: dict[str, Any], function: Callable[..., Any], owner: Any) -> Executor:
    wrappers = [w for found in options.get("wrappers", {}).get(kind, {}).values() for w in found]
    return Executor(function, owner, wrappers)


# --- models ------------------------------------------------------------------------------------------------------------
class CONST:
    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.view(-1, *[1] * (x.ndim - 1))


class EPS(CONST):
    """The host's own is no flow either, with the same arithmetic."""

    calculate_denoised = lambda self, *args: CONST.calculate_denoised(self, *args)


class COSMOS_RFLOW:
    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        t = (sigma / (sigma + 1)).view(-1, *[1] * (x.ndim - 1))
        return x * (1 - t) - output * t


class ModelSamplingDiscreteFlow(nn.Module):
    sigma_max = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        self.shift = shift

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 1.0
        if percent >= 1:
            return 0.0
        return self.shift * (1 - percent) / (1 + (self.shift - 1) * (1 - percent))


class Flow(ModelSamplingDiscreteFlow, CONST):
    pass


class Eps(ModelSamplingDiscreteFlow, EPS):
    pass


def attention_pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, skip_reshape: bool = False, **kw: Any) -> Tensor:
    """``[b, n, h d]`` or, with ``skip_reshape``, ``[b, h, n, d]`` -> ``[b, n, h d]``."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, transformer_options: dict[str, Any], **kw: Any) -> Tensor:
    override = transformer_options.get("optimized_attention_override")
    kw = {**kw, "transformer_options": transformer_options}
    return attention_pytorch(*args, **kw) if override is None else override(attention_pytorch, *args, **kw)


class Transformer(nn.Module):
    """A few layers of attention and a linear map: smooth in the latent, the time and the prompt."""

    lists: tuple[str, ...] = ()

    def __init__(self, channels: int, depth: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.time = nn.Parameter(torch.randn(channels, generator=g), requires_grad=False)
        for name in self.lists:
            layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(depth))
            for p in layers.parameters():
                p.data = torch.randn(p.shape, generator=g) / channels**0.5 / 2
            setattr(self, name, layers.requires_grad_(False))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        # all heads of 8; Flux hands over heads, SD3 and WAN tokens; WAN looks at its prompt in a second attention
        heads, text = x.shape[1] // 8, context.repeat(1, 1, x.shape[1] // 8)
        h = x.flatten(2).transpose(1, 2) + t.view(-1, 1, 1) * self.time + context.mean((1, 2)).view(-1, 1, 1)
        for name in self.lists:
            kind = "single_block" if name == "single_blocks" else "double_block"
            for i, layer in enumerate(getattr(self, name)):

                def run(args: dict[str, Any], layer: nn.Module = layer) -> dict[str, Any]:
                    z, options = torch.tanh(layer(args["img"])), args["transformer_options"]
                    if type(self).__name__ == "Flux":
                        split = z.unflatten(-1, (heads, -1)).transpose(1, 2)
                        z = optimized_attention(split, split, split, heads, mask=None, skip_reshape=True, transformer_options=options)
                    elif heads:
                        z = optimized_attention(z, z, z, heads=heads, transformer_options=options)
                    if type(self).__name__ == "WanModel":
                        z = z + optimized_attention(z, args["txt"], args["txt"], heads=heads, transformer_options=options)
                    args["img"] += z  # in place, as newer hosts do
                    return {"img": args["img"]}

                args = {"img": h, "txt": text, "transformer_options": transformer_options}
                h = (replace[(kind, i)](args, {"original_block": run}) if (kind, i) in replace else run(args))["img"]
        return h.transpose(1, 2).reshape(x.shape)


def transformer(path: str, *lists: str) -> type[Transformer]:
    """A class with the module and name of ComfyUI's own, by which tqai knows it."""
    module, _, name = path.partition(":")
    return type(name, (Transformer,), {"lists": lists, "__module__": module})


Flux = transformer("comfy.ldm.flux.model:Flux", "double_blocks", "single_blocks")
MMDiT = transformer("comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper", "joint_blocks")
WanModel = transformer("comfy.ldm.wan.model:WanModel", "blocks")
UNet = transformer("comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel", "input_blocks")
AuraFlow = transformer("comfy.ldm.aura.mmdit:MMDiT", "double_layers")
MODELS: dict[str, tuple[Any, int, float]] = caches_fake.MODELS | {
    "flux": (Flux, 16, 1.15), "sd3": (MMDiT, 16, 3.0), "sd35m": (MMDiT, 16, 3.0), "wan22_5b": (WanModel, 48, 8.0),
    "wan_14b_high": (WanModel, 16, 8.0), "wan_14b_low": (WanModel, 16, 8.0), "wan_14b_i2v": (WanModel, 16, 8.0),
    "sdxl": (UNet, 4, 1.0), "aura": (AuraFlow, 16, 1.73),
}  # fmt: skip


class BaseModel(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        cls, channels, shift = MODELS[name]
        self.diffusion_model = cls(channels, 2, sum(map(ord, name)))
        self.model_sampling = (Eps if cls is UNet else Flow)(shift)

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kw: Any,
    ) -> Tensor:
        executor = wrapped(WrappersMP.APPLY_MODEL, transformer_options, self._apply_model, self)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kw)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, control: Any, transformer_options: dict[str, Any], **kw: Any
    ) -> Tensor:
        out = self.diffusion_model(x, t, context=c_crossattn, transformer_options=dict(transformer_options))
        return self.model_sampling.calculate_denoised(t, out.float(), x)

    def memory_required(self, shape: Any, cond_shapes: Any = {}) -> float:  # noqa: B006
        return float(shape[0] * torch.Size(shape[2:]).numel() * 1000)


class ModelPatcher:
    load_device = offload_device = torch.device("cpu")

    def __init__(self, model: BaseModel) -> None:
        self.name = model.name
        self.model, self.wrappers, self.object_patches = model, {}, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        n = ModelPatcher(self.model)
        n.model_options, n.wrappers, n.object_patches = copied(self.model_options), copied(self.wrappers), dict(self.object_patches)
        return n

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))

    def set_model_patch_replace(self, patch: Any, name: str, block: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault(name, {})
        replace[(block, number)] = patch

    def set_model_sampler_post_cfg_function(self, function: Any, disable_cfg1_optimization: bool = False) -> None:
        self.model_options.setdefault("sampler_post_cfg_function", []).append(function)


def create_model_options_clone(options: dict[str, Any]) -> dict[str, Any]:
    return copied(options)


# --- comfy.samplers ----------------------------------------------------------------------------------------------------
LOADED: list[float] = []  # what load_models_gpu was asked for


def calc_cond_batch(model: BaseModel, conds: list[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Conditions of one shape run as one batch if memory allows, looked at anew each time; the last one comes first."""
    handler = options.get("context_handler")
    if handler is not None and "context_window" not in options["transformer_options"]:
        return handler.execute(calc_cond_batch, model, conds, x, timestep, options)
    model_management = sys.modules["comfy.model_management"]
    sums, counts = [torch.zeros_like(x) for _ in conds], [0] * len(conds)
    todo: list[tuple[int, dict[str, Any]]] = []
    for i, cond in enumerate(conds):
        for c in cond or []:
            late, early = c.get("timestep_start"), c.get("timestep_end")
            if not ((late is not None and timestep[0] > late) or (early is not None and timestep[0] < early)):
                todo.append((i, c))
    if options.get("multigpu"):  # newest hosts: one thread a device, cond and uncond at once
        with ThreadPoolExecutor(2) as pool:
            outs = list(pool.map(lambda item: _run([item], model, x, timestep, options), todo))
        for (i, _), out in zip(todo, outs, strict=True):
            sums[i] += out
            counts[i] += 1
        todo = []
    while todo:
        same = [t for t in todo if t[1]["cross_attn"].shape == todo[0][1]["cross_attn"].shape][::-1]
        room = model.memory_required([len(same) * x.shape[0], *x.shape[1:]]) * 1.5 < model_management.get_free_memory(x.device)
        batch = same if room else same[:1]
        todo = [t for t in todo if not any(t is b for b in batch)]
        out = _run(batch, model, x, timestep, options)
        for (i, _), part in zip(batch, out.chunk(len(batch)), strict=True):
            sums[i] += part
            counts[i] += 1
    return [s / max(n, 1) for s, n in zip(sums, counts, strict=True)]


def _run(batch: list[tuple[int, dict[str, Any]]], model: BaseModel, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Tensor:
    transformer_options = copied(options["transformer_options"])
    transformer_options.update(cond_or_uncond=[i for i, _ in batch], uuids=[c["uuid"] for _, c in batch], sigmas=timestep)
    context = torch.cat([c["cross_attn"].expand(x.shape[0], -1, -1) for _, c in batch])
    t = torch.cat([timestep] * len(batch))
    return model.apply_model(torch.cat([x] * len(batch)), t, c_crossattn=context, transformer_options=transformer_options)


class CFGGuider:
    def __init__(self, patcher: ModelPatcher) -> None:
        self.model_patcher, self.model_options, self.cfg = patcher, patcher.model_options, 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        def convert(conds: Any) -> list[dict[str, Any]]:
            return [{**extra, "cross_attn": text, "uuid": uuid.uuid4()} for text, extra in conds]

        self.original_conds = {"positive": convert(positive), "negative": convert(negative)}

    def __call__(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
        executor = wrapped(WrappersMP.PREDICT_NOISE, self.model_options["transformer_options"], self.predict_noise, self)
        return executor(x, timestep, model_options, seed)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
        negative = None if self.cfg == 1.0 else self.conds["negative"]
        conds = [self.conds["positive"], negative]
        cond, uncond = calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        out = cond if negative is None else uncond + (cond - uncond) * self.cfg
        for function in model_options.get("sampler_post_cfg_function", []):
            args = {
                "denoised": out, "cond": conds[0], "uncond": negative, "model": self.inner_model, "cond_denoised": cond,
                "sigma": timestep, "model_options": model_options, "input": x,
            }  # fmt: skip
            out = function(args)
        return out

    def outer_sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any = None, callback: Any = None,
        disable_pbar: bool = False, seed: Any = None, latent_shapes: Any = None,
    ) -> Tensor:  # fmt: skip
        def prepare(model: Any, shape: Any, conds: Any, model_options: Any = None, force_full_load: bool = False, **kw: Any) -> Any:
            LOADED.append(model.model.memory_required([shape[0] * 2, *shape[1:]]))
            return model.model, conds, []

        prepare = wrapped(WrappersMP.PREPARE_SAMPLING, self.model_options["transformer_options"], prepare, None)
        self.inner_model, self.conds, _ = prepare(
            self.model_patcher, noise.shape, self.conds, model_options=self.model_options, force_full_load=False, force_offload=False
        )
        kept = self.inner_model.model_sampling
        self.inner_model.model_sampling = self.model_patcher.get_model_object("model_sampling")
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        prefix = getattr(self.inner_model.diffusion_model, "reset_prefix_cache", lambda enabled: None)
        prefix(True)
        try:
            if isinstance(sampler, KSAMPLER):
                return sampler.sample(self, sigmas, {"model_options": options, "seed": seed}, callback, noise, latent, mask)
            return sampler(lambda x, sigma: self(x, sigma.expand(x.shape[0]), options, seed), noise, latent, sigmas, callback)
        finally:
            self.inner_model.model_sampling = kept
            prefix(False)
            for patch in self.model_options["transformer_options"].get("patches", {}).get("attn1_patch", []):
                getattr(patch, "cleanup", lambda: None)()

    def sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any, callback: Any, seed: int) -> Tensor:
        self.conds = {k: [dict(c) for c in v] for k, v in self.original_conds.items()}
        sampling = self.model_patcher.get_model_object("model_sampling")
        for c in [c for v in self.conds.values() for c in v]:
            for name in ("start", "end"):
                if f"{name}_percent" in c:
                    c[f"timestep_{name}"] = sampling.percent_to_sigma(c[f"{name}_percent"])
        original = self.model_options
        self.model_options = copied(original)
        self.model_options["transformer_options"]["wrappers"] = copied(self.model_patcher.wrappers)
        try:
            outer = wrapped(WrappersMP.OUTER_SAMPLE, self.model_options["transformer_options"], self.outer_sample, self)
            return outer(noise, latent, sampler, sigmas, mask, callback, True, seed, latent_shapes=[latent.shape])
        finally:
            self.model_options = original


def _start(noise: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
    return sigma * noise + (1 - sigma) * latent


def sample_euler(
    model: Any, noise: Tensor, latent: Tensor, sigmas: Tensor, callback: Any, heun: bool = False, fresh: float = 0.0
) -> Tensor:
    x, g = _start(noise, latent, sigmas[0]), torch.Generator().manual_seed(0)
    for i, (now, then) in enumerate(pairwise(sigmas)):
        denoised = model(x, now)
        if callback is not None:
            callback({"i": i, "denoised": denoised, "x": x, "sigma": now, "sigma_hat": now})
        d = (x - denoised) / now
        if heun and then > 0:
            ahead = x + d * (then - now)
            d = (d + (ahead - model(ahead, then)) / then) / 2
        x = x + d * (then - now)
        if fresh and then > 0:
            x = (1 - fresh * then) * x + fresh * then * torch.randn(x.shape, generator=g)
    return x


def between(model: Any, noise: Tensor, latent: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    """A midpoint sampler: half of its evaluations are at sigmas that are not in the schedule."""
    x = _start(noise, latent, sigmas[0])
    for i, (now, then) in enumerate(pairwise(sigmas)):
        denoised = model(x, now)
        if callback is not None:
            callback({"i": i, "denoised": denoised, "x": x, "sigma": now, "sigma_hat": now})
        d = (x - denoised) / now
        if then > 0:
            middle = (now * then).sqrt()
            half = x + d * (middle - now)
            d = (half - model(half, middle)) / middle
        x = x + d * (then - now)
    return x


@dataclass
class KSAMPLER:
    """What SIGMAS nodes hand over: ``function(model, noise, sigmas, extra_args=, callback=, disable=)``."""

    sampler_function: Callable[..., Tensor]

    def sample(
        self, guider: CFGGuider, sigmas: Tensor, extra: dict[str, Any], callback: Any, noise: Tensor, latent: Tensor, mask: Any
    ) -> Tensor:  # fmt: skip
        def model(x: Tensor, sigma: Tensor, denoise_mask: Any, model_options: Any = {}, seed: Any = None) -> Tensor:  # noqa: B006
            return guider(x, sigma, model_options, seed)

        model.inner_model = guider  # type: ignore[attr-defined]
        x = _start(noise, latent, sigmas[0])
        return self.sampler_function(model, x, sigmas, extra_args={**extra, "denoise_mask": mask}, callback=callback, disable=True)


@dataclass
class Named:
    """A sampler by name, with what the host's own KSAMPLER tells of it."""

    sampler_function: Callable[..., Tensor]
    extra_options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Tensor:
        return self.sampler_function(*args)


SAMPLERS: dict[str, Named] = {
    name: Named(function)
    for name, function in {
        "euler": sample_euler,
        "heun": lambda *a: sample_euler(*a, heun=True),
        "euler_ancestral": lambda *a: sample_euler(*a, fresh=0.1),
        "dpmpp_2s_ancestral": between,
        "dpmpp_2m": lambda *a: sample_euler(*a),
        "uni_pc": lambda *a: sample_euler(*a),
    }.items()
}


def sample_custom(
    model: ModelPatcher, noise: Tensor, cfg: float, sampler: Any, sigmas: Tensor, positive: Any, negative: Any, latent: Tensor,
    noise_mask: Any = None, callback: Any = None, disable_pbar: bool = False, seed: int = 0,
) -> Tensor:  # fmt: skip
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.cfg = cfg

    def told(d: dict[str, Any]) -> None:
        callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)

    return guider.sample(noise, latent, sampler, sigmas, noise_mask, told if callback else None, seed)


PENDING: list[bool] = []  # interrupts asked for


class InterruptProcessingException(Exception):
    pass


def throw_if_interrupted() -> None:
    if PENDING and PENDING.pop():
        raise InterruptProcessingException


EXECUTING: list[Any] = []  # the node that runs, innermost last


# --- installation ------------------------------------------------------------------------------------------------------
@dataclass
class FakeServer:
    sent: list[tuple[str, dict[str, Any]]]

    def send_sync(self, event: str, data: dict[str, Any], sid: Any = None) -> None:
        self.sent.append((event, data))


def modules(profile: str, folder: Path) -> dict[str, ModuleType]:
    """Everything the pack imports of a host of this version."""
    assert profile in PROFILES
    found = {
        "comfy": {},
        "comfy.patcher_extension": {"WrappersMP": WrappersMP},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher, "create_model_options_clone": create_model_options_clone},
        "comfy.model_sampling": {
            "CONST": CONST,
            "COSMOS_RFLOW": COSMOS_RFLOW,
            "EPS": EPS,
            "ModelSamplingDiscreteFlow": ModelSamplingDiscreteFlow,
        },
        "comfy.model_management": {
            "intermediate_device": lambda: torch.device("cpu"),
            "get_free_memory": lambda device=None, torch_free_too=False: 10**12,
            "InterruptProcessingException": InterruptProcessingException,
            "interrupt_current_processing": PENDING.append,
            "throw_exception_if_processing_interrupted": throw_if_interrupted,
        },
        "comfy.samplers": {
            "calc_cond_batch": calc_cond_batch,
            "sampler_object": SAMPLERS.__getitem__,
            "CFGGuider": CFGGuider,
            "KSAMPLER": KSAMPLER,
        },
        "comfy.sample": {"sample_custom": sample_custom},
        "comfy_api": {},
        "comfy_execution": {},
        "comfy_execution.utils": {"get_executing_context": lambda: EXECUTING[-1] if EXECUTING else None},
        "folder_paths": {
            "models_dir": str(folder / "models"),
            "get_output_directory": lambda: str(folder / "output"),
            "get_input_directory": lambda: str(folder / "input"),
        },
        "server": {"PromptServer": SimpleNamespace(instance=FakeServer([]))},
    }
    made = {}
    for name, content in found.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
    made["comfy_api.latest"] = comfy_api_fake.module()
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made
