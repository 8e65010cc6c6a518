"""Where tqai meets a ComfyUI model. Only frozen settings live in its options; state lives from OUTER_SAMPLE's start to end."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import ref

import comfy.model_management
import torch

from tqai_core.config import Config
from tqai_core.errors import TqaiError
from tqai_core.families import FAMILIES, find
from tqai_core.layers import exact_layers
from tqai_core.legacy import Legacies
from tqai_core.roles import EntropyMonitor
from tqai_core.scorers.fisher import Fisher, load, origin

from .half_size import sized
from .levels import FORWARD, Forward, marker, override
from .page import executing, sender
from .parametrisation import Parametrisation, of
from .run import Chunk, Kind, Run
from .run_history import HISTORY, Entry
from .schedule import Schedule
from .wrappers import of_evaluation, of_forward, own_options, settings_of, wrap

KEY, RUN = "tqai", "tqai_run"
LEGACIES = Legacies()
OWN_CACHE = ("not blocks_replace", "not hooked")  # in the source of models that keep something while nobody replaces their blocks


@dataclass(frozen=True)
class Settings:
    """What a patched model carries. ``budget`` is in bytes, ``node`` the id of the Compress node."""

    config: Config
    node: str | None = None
    budget: int | None = None


def kind_of(model: Any) -> Kind:
    """What is known of a ModelPatcher's model."""
    inner = model.model.diffusion_model
    family = find(inner, "comfyui")
    if family is None or family.comfyui is None:
        return Kind(type(inner).__name__, [], None)
    if not family.comfyui.blocks or _own_cache(type(inner).__module__):
        return Kind(family.name, [], family)
    blocks = [f"{name}.{i}" for name in family.comfyui.blocks for i in range(len(getattr(inner, name, ())))]
    patch = getattr(inner, "patch_size", 2 if family.tolerances else 0)
    return Kind(family.name, blocks, family, patch if isinstance(patch, int) else patch[-1], family.comfyui.levels)


@cache
def _own_cache(module: str) -> bool:
    """Whether a model keeps K/V or features over the steps only while nobody replaces its blocks."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is not None and any(test in Path(path).read_text(encoding="utf-8") for test in OWN_CACHE)


def _exact(config: Config, kind: Kind) -> frozenset[int]:
    """Numbers of the blocks that ``skip_layers`` names. TqaiError for one that the model does not have."""
    return frozenset(exact_layers(config.skip_layers if kind.blocks else (), kind.blocks, f"this {kind.name} model")[0])


def _check_files(config: Config, kind: Kind) -> None:
    """TqaiError for a calibration of another family or depth. ComfyUI stores weights in another form than diffusers, so that the
    model's hash cannot be compared here."""
    scorer, depth = config.build()[0], len(kind.blocks)
    if isinstance(scorer, Fisher) and (made := origin(scorer.file, "family")) is not None:
        layers = len(load(scorer.file)[0])
        if (made, layers) != (kind.name, depth):
            raise TqaiError(
                f"fisher table {scorer.file!r} is of a {made or 'language'} model with {layers} layers, this {kind.name} has {depth}: "
                "run tqai calibrate on this model"
            )


def _mark(clone: Any, kind: Kind) -> None:
    """Markers around every block and an override in front of attention, each around what was there before."""
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override(options.get("optimized_attention_override"))
    replaced = options.get("patches_replace", {}).get("dit", {})
    for number, name in enumerate(kind.blocks if "block" in kind.levels else ()):
        place, _, i = name.partition(".")
        slot = "single_block" if place.startswith("single") else "double_block"
        clone.set_model_patch_replace(marker(number, replaced.get((slot, int(i)))), "dit", slot, int(i))


def patch(model: Any, settings: Settings) -> Any:
    """A clone of a ModelPatcher that samples with tqai. Raises ValueError, with ``model`` as it was."""
    if settings_of(model.model_options, KEY) is not None:
        raise TqaiError("this model already went through TQAI Compress: remove one of the two nodes, or set both pipelines in one")
    config, kind = settings.config, kind_of(model)
    _exact(config, kind)
    _check_files(config, kind)
    if config.level not in kind.levels:
        known = ", ".join(f.name for f in FAMILIES.values() if f.comfyui and f.comfyui.blocks and config.level in f.comfyui.levels)
        raise TqaiError(
            f"level {config.level!r} knows {known} models, this is a {kind.name}: take level {' or '.join(map(repr, kind.levels))}"
        )
    clone = model.clone()
    strategy, monitor = config.build()[1:3]
    if kind.blocks and strategy is not None and monitor is not None and (config.level != "model" or isinstance(monitor, EntropyMonitor)):
        _mark(clone, kind)
    wrappers = {"OUTER_SAMPLE": _outer_sample, "PREPARE_SAMPLING": _prepare_sampling, "PREDICT_NOISE": _predict_noise}
    return wrap(clone, KEY, settings, wrappers | {"APPLY_MODEL": _apply_model})


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """One sampling of one model: a fresh run in a copy of the guider's options, gone when it ends, fails or is stopped."""
    guider = executor.class_obj
    original = guider.model_options
    settings = settings_of(original, KEY)
    if settings is None:
        return executor(*args, **kwargs)
    given = dict(zip(("noise", "latent_image", "sampler", "sigmas", "denoise_mask"), args, strict=False)) | kwargs
    sigmas = given["sigmas"]
    run = _start(guider.model_patcher, settings, original, sigmas, given.get("denoise_mask") is not None)
    run.flow.inherit(LEGACIES.get(given["latent_image"], float(sigmas[0])))
    run.flow.half_size.model = ref(guider.model_patcher.model.diffusion_model)
    failed = True
    try:
        with own_options(guider, RUN, run):
            result = executor(*args, **kwargs)
        result = result if sigmas[-1] == 0 else _handed_on(run, result, float(sigmas[-1]))
        failed = False
        return result
    finally:
        report = run.close(failed)
        _remember(settings, run.kind.name, report, failed)


def _handed_on(run: Run, latent: Any, sigma: float) -> Any:
    """A latent with noise left, for a second expert to go on with: where and as the host keeps it, so that the history lives as long."""
    if (legacy := run.flow.leave()) is not None:
        host = comfy.model_management
        latent = latent.to(host.intermediate_device(), getattr(host, "intermediate_dtype", lambda: latent.dtype)())
        LEGACIES.put(latent, sigma, legacy.moved(latent.device))
    return latent


def _start(patcher: Any, settings: Settings, options: dict[str, Any], sigmas: Any, inpainting: bool) -> Run:
    sampling, found = patcher.get_model_object("model_sampling"), of(patcher)
    kind = kind_of(patcher)
    exact = _exact(settings.config, kind)
    flow, bypass = (found, None) if isinstance(found, Parametrisation) else (Parametrisation(scaled=False), found)
    if bypass is None and "easycache" in options.get("transformer_options", {}):
        bypass = "EasyCache or LazyCache is on this model too: two step skippers cannot see each other's error; remove one"
    elif bypass is None and kind.blocks and len(exact) == len(kind.blocks):
        bypass = f"all {len(kind.blocks)} blocks are in skip layers"
    times = [flow.time(sigma) for sigma in sigmas.tolist()]
    schedule = Schedule.of(times, lambda percent: flow.time(float(sampling.percent_to_sigma(percent))))
    free_memory = lambda: int(comfy.model_management.get_free_memory(torch.device("cpu")))  # noqa: E731
    return Run(settings.config, kind, schedule, bypass, settings.budget, sender(settings.node), free_memory, exact, inpainting, flow)


def _prepare_sampling(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    """Make ComfyUI leave room for what will be held: it asks a wider latent's memory when it loads the model."""
    options = kwargs.get("model_options") or (args[0] if args and isinstance(args[0], dict) else {}) or {}
    if (settings := settings_of(options, KEY)) is not None:
        noise_shape = _roomier(model, noise_shape, conds, settings)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _roomier(model: Any, noise_shape: Any, conds: Any, settings: Settings) -> list[int]:
    shape = list(noise_shape)
    strategy = settings.config.build()[1]
    streams = sum(len(cond) for cond in conds.values()) if isinstance(conds, dict) else 2
    held = math.prod(shape) * 4 * streams * (1 if strategy is None else strategy.order + 1)  # an upper bound: uncoded fp32
    if settings.config.level != "model":  # a stream a block: the budget decides
        held = settings.budget or 0
    held = held if settings.budget is None else min(held, settings.budget)
    needed = model.model.memory_required([shape[0] * 2, *shape[1:]])
    if needed > 0 and shape[-1] > 0:
        shape[-1] = math.ceil(shape[-1] * (1 + held / needed))
    return shape


def _predict_noise(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
    """One evaluation of the sampler, with any number of forwards in it. The step's one host sync is here."""
    options, run = of_evaluation(args, kwargs, RUN)
    if run is None:
        return executor(x, timestep, *args, **kwargs)
    plus = any(f.__module__ == "comfy.k_diffusion.sampling" for f in options.get("sampler_post_cfg_function", ()))
    with run.evaluation(run.parametrisation.time(float(timestep.flatten()[0])), x, plus):
        denoised = executor(x, timestep, *args, **kwargs)
    return run.sampled(denoised)


def _apply_model(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward. APPLY_MODEL and not DIFFUSION_MODEL, which SD3 never calls."""
    options, run = of_forward(args, kwargs, RUN)
    if run is None:
        return executor(x, t, *args, **kwargs)
    window = options.get("context_window")
    frames = tuple(window.index_list) if hasattr(window, "index_list") else None
    sides, uuids = options.get("cond_or_uncond", ()), options.get("uuids", ())
    chunks = [Chunk(side, uuid, frames) for side, uuid in zip(sides, uuids)]  # noqa: B905 - older hosts give no uuids
    inputs = dict(zip(("c_concat", "c_crossattn", "control"), args, strict=False))
    inputs |= {k: v for k, v in kwargs.items() if k != "transformer_options"}

    def compute(forward: Forward | None) -> Any:
        def host(x: Any, t: Any) -> Any:
            return executor(x, t, *args, **kwargs) if forward is None else _with_forward(executor, x, t, args, kwargs, forward)

        return sized(run, x, t, inputs, host)

    return run.forward(
        x,
        chunks,
        compute,
        lambda denoised: run.parametrisation.velocity(x, t, denoised),
        lambda velocity: run.parametrisation.denoised(x, t, velocity),
        inputs,
    )


def _with_forward(executor: Any, x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward) -> Any:
    """The forward, with what its blocks must know in options of its own."""
    if kwargs.get("transformer_options"):
        return executor(x, t, *args, **{**kwargs, "transformer_options": {**kwargs["transformer_options"], FORWARD: forward}})
    return executor(x, t, *args[:3], {**args[3], FORWARD: forward}, *args[4:], **kwargs)


def _remember(settings: Settings, family: str, report: dict[str, Any], failed: bool) -> None:
    HISTORY.put(Entry(settings.node, executing(), family, report, not failed))
    skipped = sum(d["action"] == "forecast" for d in report["decisions"])
    reasons = "; ".join(dict.fromkeys([f["why"] for f in report["fallbacks"]] + report["warnings"]))
    logging.info("[tqai] %s: %d of %d evaluations forecast%s", family, skipped, report["evaluations"], f" ({reasons})" if reasons else "")
