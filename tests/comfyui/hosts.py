"""One interface to the fake host and to a real ComfyUI checkout, so that the same tests run on both."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = {"wan22_5b": 48, "sdxl": 4}
VIDEO = ("wan22_5b", "wan_14b_high", "wan_14b_low", "wan_14b_i2v", "mini_wan")
TEXT = {"flux": (64, 64), "mini_flux": (64, 64), "sd3": (4096, 2048), "sd35m": (4096, 2048), "mini_sd3": (4096, 2048)}
BLOCKS = ("double_blocks", "joint_blocks", "blocks", "input_blocks")


@dataclass
class Host:
    """``pack`` is our package as ComfyUI loads it: by path, under a name of its own."""

    version: str
    real: bool
    folder: Path
    pack: Any
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    server: Any = None

    def part(self, name: str) -> Any:
        """A module of the pack, as in ``part("nodes.patch")``."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")

    def load(self, name: str, **options: Any) -> Any:
        """A tiny random model by its name, or a trained one (``mini_flux``). ``options`` are those of a real host's loader."""
        if not self.real:
            import comfy_fake

            return comfy_fake.ModelPatcher(comfy_fake.BaseModel(name))
        import comfy.sd
        import comfy.utils

        path = self.folder / f"{name if name.startswith('mini') else f'tiny_{name}'}.safetensors"
        return comfy.sd.load_diffusion_model_state_dict(comfy.utils.load_torch_file(str(path)), model_options=options)

    def run(self, node: str, *, unique_id: str | None = None, prompt: Any = None, **inputs: Any) -> Any:
        """Execute a node of ours the way the host does, hidden inputs included."""
        cls = self.pack.NODE_CLASS_MAPPINGS[node]
        hidden = sys.modules["comfy_api.latest"].io.Hidden
        return cls.PREPARE_CLASS_CLONE({"hidden_inputs": {hidden.unique_id: unique_id, hidden.prompt: prompt}}).execute(**inputs)

    @property
    def interrupted(self) -> type[BaseException]:
        """What an interrupt raises."""
        return sys.modules["comfy.model_management"].InterruptProcessingException

    def interrupt(self) -> None:
        """What the page's Cancel does, and the place where the host notices it."""
        import comfy.model_management as management

        management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()

    def compress(self, model: Any, pipeline: Any = None, **over: Any) -> Any:
        inputs = {"preset": "balanced", "level": "model", "codec": {"codec": "from pipeline"}, "memory_budget": 512, "enabled": True}
        return self.run("TQAICompress", model=model, pipeline=pipeline, **{"unique_id": "7", **inputs, **over}).result[0]

    def pipeline(self, monitor: str = "fixed", **options: Any) -> Any:
        """Every second step skipped, whatever the errors: random models are not smooth enough for a tolerance."""
        return self.run("TQAIMonitor", monitor={"monitor": monitor, **options}).result[0]

    def conds(self, name: str, seed: int, tokens: int = 8, **extra: Any) -> list[Any]:
        g = torch.Generator().manual_seed(seed)
        width, pooled = TEXT.get(name, (4096, 0)) if self.real else (8, 0)
        d: dict[str, Any] = {"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {}
        if name == "flux":
            d["guidance"] = 3.5
        return [[torch.randn(1, tokens, width, generator=g), {**d, **extra}]]

    def noise(self, name: str, seed: int = 0, batch: int = 1) -> Tensor:
        shape = (CHANNELS.get(name, 16), 3, 8, 8) if name in VIDEO else (CHANNELS.get(name, 16), 16, 16)
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))

    def sample(
        self, model: Any, name: str, *, steps: int = 20, cfg: float = 4.0, sampler: Any = "euler", seed: int = 0, callback: Any = None,
        positive: Any = None, negative: Any = None, sigmas: Tensor | None = None, noise: Tensor | None = None, latent: Tensor | None = None,
        mask: Tensor | None = None, raw: bool = False,
    ) -> Tensor:  # fmt: skip
        """The latent in the model's own scale (``raw``: as the host gives it), sampled without gradients as the host's executor does it.
        ``sampler`` is a name, or one of the host's objects; ``latent`` stays where ``mask`` is 0."""
        import comfy.sample
        import comfy.samplers

        noise = self.noise(name, seed) if noise is None else noise
        with torch.inference_mode():
            out = comfy.sample.sample_custom(
                model, noise, cfg, comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler,
                torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas,
                self.conds(name, 1) if positive is None else positive, self.conds(name, 2) if negative is None else negative,
                torch.zeros_like(noise) if latent is None else latent, callback=callback, disable_pbar=True, seed=seed,
                **({} if mask is None else {"noise_mask": mask}),
            )  # fmt: skip
            return model.model.process_latent_in(out) if self.real and not raw else out

    def report(self) -> dict[str, Any]:
        return self.part("nodes.run_history").HISTORY.last()[0].report

    @contextlib.contextmanager
    def forwards(self, model: Any) -> Iterator[list[int]]:
        """Batch size of every forward that really ran, counted in the model's first block and not by us."""
        inner, seen = model.model.diffusion_model, []
        first = next(getattr(inner, name)[0] for name in BLOCKS if hasattr(inner, name))
        handle = first.register_forward_pre_hook(lambda m, a, k: seen.append(len((*a, *k.values())[0])), with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    @contextlib.contextmanager
    def runs(self, seen: list[Any]) -> Iterator[list[Any]]:
        """Every run that starts within is added to ``seen``."""
        patch = self.part("nodes.patch")
        real = patch.Run

        def made(*args: Any, **kw: Any) -> Any:
            seen.append(real(*args, **kw))
            return seen[-1]

        patch.Run = made
        try:
            yield seen
        finally:
            patch.Run = real


def load_pack(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def fake(profile: str, folder: Path) -> Iterator[Host]:
    sys.path.insert(0, str(ROOT / "tests/fakes"))
    import comfy_fake

    made = comfy_fake.modules(profile, folder)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    name = f"tqai_pack_{profile.replace('.', '_')}"
    try:
        server = made["server"].PromptServer.instance
        yield Host(profile, False, folder, load_pack(name), server.sent, server)
    finally:
        for key in [k for k in sys.modules if k == name or k.startswith(f"{name}.")]:
            del sys.modules[key]
        for key, module in before.items():
            if module is None:
                sys.modules.pop(key, None)
            else:
                sys.modules[key] = module


def real(path: str, folder: Path) -> Host:
    """ComfyUI itself, in this process and for good: it cannot be unloaded."""
    sys.path.insert(0, path)
    sys.path.append(str(ROOT))
    sys.modules.pop(ROOT.name, None)  # pytest imports the checkout as a package: one in a folder `comfy` would hide ComfyUI's
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(folder), "--output-directory", str(folder / "output")]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv
    import logging

    logging.getLogger().setLevel(logging.ERROR)
    import comfyui_version
    import folder_paths
    import utils.install_util  # noqa: F401 - before anything of ours shadows `utils`

    for name in ("output", "input", "temp"):
        os.makedirs(folder / name, exist_ok=True)
    folder_paths.set_input_directory(str(folder / "input"))
    folder_paths.set_temp_directory(str(folder / "temp"))
    import checkpoints
    import comfy_api.latest  # noqa: F401

    checkpoints.write(folder)
    return Host(comfyui_version.__version__, True, folder, load_pack("tqai_pack_real"))
