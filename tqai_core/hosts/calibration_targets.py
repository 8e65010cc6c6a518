"""What calibration needs of a model: calls it makes on the way, to be made again with gradients, and what an error is."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import Config
from ..errors import TqaiError
from ..families import family_of
from ..report import Report
from .attention_interceptor import Change, blocks_of, intercept_attention, skipped

Run = Callable[[], Tensor]
WINDOW = 512  # tokens
PROMPTS = (
    "a red fox in the snow, photograph", "an old harbour at dusk, oil painting", "portrait of a violin maker in his workshop",
    "a glass of water on a wooden table", "a street market in the rain, seen from above", "a mountain lake with fog, wide shot",
    "two children flying a kite on a beach", "macro photograph of a dandelion",
)  # fmt: skip


class CalibrationTarget(Protocol):
    """A model with its calibration data. ``sigmas``: the noise levels at which sensitivity is measured ([0] for language)."""

    model: nn.Module
    kind: str
    sigmas: tuple[float, ...]
    band: int  # of the call under way
    probes: int  # a call, by default

    def record(self, seed: int, change: Change | None = None) -> list[tuple[int, Run]]:
        """(band, call) of the model's calls with this seed; ``change`` gets all attention of the run."""

    def probe(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """A random cotangent whose second moment is the output's metric."""

    def damage(self, out: Tensor, exact: Tensor) -> float:
        """The loss of ``out`` against ``exact``."""

    def size(self, exact: Tensor) -> float:
        """What ``damage`` is relative to."""

    def final(self, seed: int, change: Change | None = None) -> Tensor:
        """The end result with this seed, with all attention changed."""


@dataclass
class Diffusion:
    """A pipeline of diffusers. ``inputs`` gives the keyword arguments of a run by its seed."""

    pipe: Any
    inputs: Callable[[int], dict[str, Any]]
    steps: int = 24
    bands: int = 3
    part: str = "transformer"
    kind: str = "diffusion"
    sigmas: tuple[float, ...] = ()
    band: int = 0
    probes: int = 1

    def __post_init__(self) -> None:
        self.model: Any = getattr(self.pipe, self.part, None)
        if self.model is None:
            raise TqaiError(f"{type(self.pipe).__name__} has no {self.part}: give --part transformer")
        if not 1 <= self.bands <= self.steps:
            raise TqaiError(f"bands={self.bands}: give 1 to {self.steps}, the number of steps")
        self.family = family_of(self.model, "model")  # all that calibration needs beyond that, it asks for itself
        self.model.requires_grad_(False).eval()

    def _generate(self, seed: int) -> Tensor:
        given = {"num_inference_steps": self.steps, "output_type": "latent", "return_dict": False, **self.inputs(seed)}
        made = tree_leaves(self.pipe(**given, generator=torch.Generator("cpu").manual_seed(seed)))
        tensors = [part.float() for part in made if isinstance(part, Tensor)]
        if not tensors:
            raise TqaiError(f"{type(self.pipe).__name__} returns no tensor when asked for latents: measure errors on another pipeline")
        return tensors[0] if len(tensors) == 1 else torch.cat([part.flatten() for part in tensors])  # a film and its sound

    @torch.no_grad()
    def final(self, seed: int, change: Change | None = None) -> Tensor:
        hook = self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        try:
            with intercept_attention(self.model, change):
                return self._generate(seed)
        finally:
            hook.remove()

    def run(self, seed: int, config: Config | None = None) -> tuple[Tensor, float, Report]:
        """The end result with a pipeline of tqai, CPU seconds, and its report, which is empty without a pipeline."""
        import tqai_core

        with nullcontext() if config is None else tqai_core.apply(self.pipe, config) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a candidate that skips nothing is a valid result
            began = time.process_time()
            out = self._generate(seed)
            return out, time.process_time() - began, handle.report() if handle else Report()

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sigma = self.family.sigma(kwargs["timestep"])
        self.band = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma), default=0)

    def record(self, seed: int, change: Change | None = None) -> list[tuple[int, Run]]:
        calls: list[tuple[float, dict[str, Any]]] = []

        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            latents = kwargs["hidden_states"].detach().clone()  # samplers may write into these; all else is the same at every step
            calls.append((self.family.sigma(kwargs["timestep"]), {**kwargs, "hidden_states": latents}))

        hook = self.model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.final(seed, change)
        finally:
            hook.remove()
        if not calls:
            raise TqaiError(f"the pipeline made no call of its {self.part}: give --part of the expert that runs")
        seen = sorted({sigma for sigma, _ in calls}, reverse=True)
        chosen = [seen[round((i + 0.5) / self.bands * (len(seen) - 1))] for i in range(self.bands)]
        self.sigmas = self.sigmas or tuple(chosen)
        again = lambda kwargs: lambda: self.model(**{**kwargs, "return_dict": False})[0]  # noqa: E731
        return [(chosen.index(sigma), again(kwargs)) for sigma, kwargs in calls if sigma in chosen]

    def probe(self, out: Tensor, generator: torch.Generator) -> Tensor:
        signs = torch.randint(0, 2, out.shape, generator=generator, dtype=torch.int8)
        return (signs * 2 - 1).to(out.device, out.dtype)

    def damage(self, out: Tensor, exact: Tensor) -> float:
        return float((out.float() - exact.float()).square().sum())

    def size(self, exact: Tensor) -> float:
        return float(exact.float().square().sum())


@dataclass
class Language:
    """A causal language model of transformers and the windows of text that it reads."""

    model: Any
    windows: Windows
    kind: str = "lm"
    sigmas: tuple[float, ...] = (0.0,)
    band: int = 0
    probes: int = 4  # one window is one sample, whose positions all share a probe

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    def _run(self, ids: Tensor, first: int = 0) -> Tensor:
        ids = ids.to(self.model.device)
        where = {"position_ids": torch.arange(first, first + ids.shape[1], device=ids.device)[None]} if first else {}
        return self.model(ids, use_cache=False, **where).logits.float().log_softmax(-1)

    @torch.no_grad()
    def final(self, seed: int, change: Change | None = None) -> Tensor:
        with intercept_attention(self.model, change):
            return self._run(self.windows(seed))

    @property
    def most(self) -> int:
        """Positions that the model knows; 0 where its configuration does not tell."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 0)

    @torch.no_grad()
    def far(self, seed: int, part: float, change: Change | None = None) -> Tensor:
        """The end result where the window begins at ``part`` of the positions that the model knows. Outputs of rotary positions are the
        same everywhere, keys are not."""
        ids = self.windows(seed)
        with intercept_attention(self.model, change):
            return self._run(ids, max(int(part * (self.most - ids.shape[1])), 0))

    def reading(self, seeds: Sequence[int], length: int, last: int, part: float = 0.0) -> Reading:
        """One text a seed, of ``length`` tokens where there are as many; every second one begins at ``part`` of the positions."""
        most = self.most or length
        ids = torch.cat([self.windows(s, min(length, most))[:1] for s in seeds]).to(self.model.device)
        first = torch.arange(len(ids), device=ids.device) % 2 * int(part * max(most - ids.shape[1], 0))
        return Reading(self.model, ids, first[:, None], last)

    def record(self, seed: int, change: Change | None = None) -> list[tuple[int, Run]]:
        ids = self.windows(seed)
        if change is not None:
            self.final(seed, change)
        return [(0, partial(self._run, row)) for row in ids.split(1)]

    def probe(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the log likelihood of tokens drawn from the model itself: the Fisher information of softmax."""
        p = out.detach().exp()
        drawn = torch.multinomial(p.flatten(0, -2).cpu(), 1, generator=generator).view(out.shape[:-1]).to(out.device)
        return torch.zeros_like(out).scatter_(-1, drawn[..., None], 1.0)

    def damage(self, out: Tensor, exact: Tensor) -> float:
        """KL divergence in nats, summed over positions."""
        return float((exact.exp() * (exact - out)).sum())

    def size(self, exact: Tensor) -> float:
        return float(exact[..., 0].numel())


class Reading:
    """The ``last`` tokens of texts ``ids [B, n]``, read after the others by the exact model, and again with other keys and values.
    ``first int64 [B, 1]``: positions at which the texts begin. ``exact``: log probabilities ``fp32 [B, last, vocabulary]``."""

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor, first: Tensor, last: int) -> None:
        from transformers import DynamicCache

        self.model, self.ids, self.last = model, ids[:, -last:], last
        self.where = first + torch.arange(ids.shape[1], device=ids.device)
        self.cache = DynamicCache(config=model.config)
        model.get_decoder()(ids[:, :-last], past_key_values=self.cache, position_ids=self.where[:, :-last])
        self.outputs: list[Any] = []
        hooks = [block.register_forward_hook(lambda module, args, out: self.outputs.append(out)) for block in blocks_of(model)]
        try:
            self.exact = self.again(None)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def again(self, change: Change | None, known: int = 0) -> Tensor:
        """The same with all attention changed. The first ``known`` layers are not changed, so they are not computed."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]  # new tokens make new tensors there
        with intercept_attention(self.model, change), skipped(self.model, self.outputs[:known]):
            out = self.model(self.ids, past_key_values=cache, position_ids=self.where[:, -self.last :])
        return out.logits.float().log_softmax(-1)

    def loss(self, change: Change, known: int = 0) -> float:
        """KL divergence from the exact run in nats a token."""
        return float((self.exact.exp() * (self.exact - self.again(change, known))).sum(-1).mean())


@dataclass(frozen=True, eq=False)
class Windows:
    """``count`` windows ``[count, length]`` of the tokens ``ids [n]`` at random places, by seed."""

    ids: Tensor
    count: int

    def __call__(self, seed: int, length: int = WINDOW) -> Tensor:
        length = min(length, len(self.ids) - 1)
        places = torch.randint(0, len(self.ids) - length, (self.count,), generator=torch.Generator().manual_seed(seed)).tolist()
        return torch.stack([self.ids[i : i + length] for i in places])


def demo(kind: str, count: int | None = None, steps: int = 24, bands: int = 3) -> CalibrationTarget:
    """A mini that ships with tqai: flux, sd3, wan or lm."""
    from .. import minis

    if kind == "lm":
        return Language(minis.lm(), Windows(minis.lm_text()[: 2**16], count or 4))  # the other half is for benches
    if kind not in minis.KINDS:
        raise TqaiError(f"unknown mini {kind!r}; known: {', '.join(minis.KINDS)}, lm")
    many = count or {"flux": 8, "sd3": 6, "wan": 2}[kind]
    return Diffusion(minis.pipeline(kind), lambda seed: minis.inputs(kind, [(i + 3 * seed) % 10 for i in range(many)]), steps, bands)


def folder(
    path: Path, prompts: Sequence[str] = (), text: str = "", steps: int = 24, bands: int = 3, part: str = "transformer", count: int = 1
) -> CalibrationTarget:
    """A diffusers pipeline or a transformers causal LM in a folder. Raises TqaiError where it is neither."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (path / "model_index.json").is_file():
        from .diffusers.load import pipeline

        pipe = pipeline(path, local_files_only=True)
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise TqaiError(f"{type(pipe).__name__} takes no prompt: give a Diffusion(pipe, inputs) of your own to tqai_core.calibrate")
        lines = list(prompts) or list(PROMPTS)
        inputs = lambda seed: {"prompt": [lines[(seed * count + i) % len(lines)] for i in range(count)]}  # noqa: E731
        return Diffusion(pipe, inputs, steps, bands, part)
    if not (path / "config.json").is_file():
        raise TqaiError(
            f"{path} holds neither model_index.json (a diffusers pipeline) nor config.json (a language model): give such a folder"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not text:
        raise TqaiError(f"{path} is a language model: give the text to calibrate on, --text FILE")
    lm = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).to(device)
    ids = AutoTokenizer.from_pretrained(path, local_files_only=True)(text, return_tensors="pt")["input_ids"][0]
    if len(ids) <= WINDOW:
        raise TqaiError(f"the text has {len(ids)} tokens, calibration reads windows of {WINDOW}: give a longer one")
    return Language(lm, Windows(ids, count))
