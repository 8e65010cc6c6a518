"""A calibrated sampler as SIGMAS and SAMPLER."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from tqai_core.calibrate.sampler import FORMAT, CalibratedSampler
from tqai_core.errors import TqaiError
from tqai_core.files import read_text

from . import files
from .parametrisation import Parametrisation, of
from .widgets import CATEGORY, EMPTY, verdict

HEAD = 200  # bytes of a JSON file that are searched for the format's name


class TQAISampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAISampler",
            display_name="TQAI Calibrated Sampler",
            category=CATEGORY,
            description=(
                "Sampling in a few steps that were fitted to your very model. Reads a file of the command tqai calibrate --sampler and "
                "gives its sigmas and its sampler, for SamplerCustom and SamplerCustomAdvanced. A file holds for its model, its number of "
                "steps and its range of guidance."
            ),
            search_aliases=["tqai", "solver", "sigmas", "few steps", "calibrated"],
            inputs=[
                io.Model.Input("model", tooltip="The model the file was made for; its first layer's weights are compared."),
                io.Combo.Input("file", options=listing() or [EMPTY], tooltip="Sampler files in models/tqai and in the input folder."),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="The steps of the file, from 1 to 0."),
                io.Sampler.Output(display_name="sampler", tooltip="Takes these sigmas and no others, from noise and without a mask."),
                io.String.Output(display_name="about", tooltip="Steps, guidance and the error measured on held-out seeds."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """Instead of the built-in check, which knows only the files that were there when the page was loaded."""
        return verdict(lambda: CalibratedSampler.load(locate(file)))

    @classmethod
    def fingerprint_inputs(cls, file: str, model: Any = None) -> str:
        return read_text(locate(file), what="sampler file", again="calibrate again")

    @classmethod
    def execute(cls, model: Any, file: str) -> io.NodeOutput:
        sampler = CalibratedSampler.load(locate(file))
        if sampler.difference is not None:
            raise TqaiError(f"{file} forecasts the guidance difference, which this node does not do: calibrate without --difference")
        if of(model) != Parametrisation(scaled=False):
            raise TqaiError(f"{file} is for flow-matching models (SD3, Flux, WAN), this is another kind: use another sampler")
        compared = sampler.check_entry(model.model.diffusion_model)
        sigmas = torch.tensor([*sampler.nodes, 0.0])
        return io.NodeOutput(sigmas, comfy.samplers.KSAMPLER(function_of(sampler)), about(sampler, compared))


def function_of(sampler: CalibratedSampler) -> Any:
    """What ComfyUI's KSAMPLER calls. Each run has a solver of its own."""

    def sample_tqai(model: Any, noise: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None) -> Tensor:
        extra = extra_args or {}
        check(sampler, sigmas, getattr(model.inner_model, "cfg", None), extra.get("denoise_mask"))
        solver, x = sampler.solver(), noise
        for i, sigma in enumerate(sampler.nodes):
            denoised = model(x, sigma * x.new_ones([x.shape[0]]), **extra)
            if callback is not None:
                callback({"i": i, "denoised": denoised, "x": x, "sigma": sigmas[i], "sigma_hat": sigmas[i]})
            x = solver.step(i, (x - denoised) / sigma, x).to(noise.dtype)
        return x

    return sample_tqai


def check(sampler: CalibratedSampler, sigmas: Tensor, cfg: float | None, mask: Any) -> None:
    """ValueError for another schedule, a start from an image, a mask, or guidance out of range."""
    nodes = torch.tensor([*sampler.nodes, 0.0])
    if len(sigmas) != len(nodes) or not torch.allclose(sigmas.float().cpu(), nodes, atol=1e-4):
        raise TqaiError(
            f"the sampler got {len(sigmas) - 1} steps from {float(sigmas[0]):.3g} to {float(sigmas[-1]):.3g}, but was calibrated for the "
            f"{sampler.steps} of TQAI Calibrated Sampler's own sigmas output: connect that one, without denoise or split"
        )
    if mask is not None:
        raise TqaiError("a latent with a mask asked: a calibrated sampler makes whole pictures, use another sampler to inpaint")
    if cfg is None:
        return
    embedded = sampler.guidance["name"] == "guidance_scale" and sampler.model_class.startswith("Flux")
    if embedded and cfg != 1:
        raise TqaiError(f"cfg {cfg:g} asked, but this sampler was calibrated without CFG: set cfg to 1")
    if not embedded:
        sampler.check(guidance=cfg)


def about(sampler: CalibratedSampler, compared: bool) -> str:
    held, g = sampler.held_out, sampler.guidance
    return (
        f"{sampler.steps} steps for {sampler.model_class}, {g['name']} {g['low']:g} to {g['high']:g}. Held-out NMSE {held['error']:.3g}, "
        f"{held['stock']['name']} at shift {held['stock']['shift']:g}: {held['stock']['error']:.3g}. "
        + ("First layer's weights match." if compared else "The model's weights could not be compared with the file's.")
    )


def _folders() -> dict[str, str]:
    return {"models": os.path.join(folder_paths.models_dir, files.FOLDER), "input": folder_paths.get_input_directory()}


def _is_sampler(path: Path) -> bool:
    """Whether a JSON file begins as a sampler's does."""
    with path.open("rb") as f:
        return FORMAT.encode() in f.read(HEAD)


def listing() -> list[str]:
    return files.choices(_folders(), _is_sampler)


def locate(choice: str) -> Path:
    """A file of :func:`listing`."""
    return files.chosen(choice, _folders(), "sampler", listing(), "tqai calibrate --sampler makes one, put it into models/tqai")
