"""Models with a cache node on the fake host and on real ones: what tests of TQAI Cache run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import setups
import torch
from torch import Tensor

STEPS = 6


@dataclass(frozen=True)
class Case:
    """``node(model, dtype)`` puts the host's cache node on a model; ``dtypes`` are those that the node offers, ``other`` the conditions of
    another reference."""

    model: Callable[[], Any]
    node: Callable[..., Any]
    draw: Callable[..., Tensor]
    dtypes: tuple[str, ...] = ("default",)
    other: Any = None


def klein(heads: int = 1) -> setups.Setup:
    """FLUX.2 Klein, which takes no guidance, with one reference picture of 400 tokens; 128 channels in one head or two."""
    sizes = dict(hidden_size=128, num_heads=heads, axes_dim=[32 // heads] * 4, guidance_embed=False)
    return setups.Setup("Flux2", setups.FLUX2 | sizes, ((1, 128, 8, 8),), shared={"reference_latents": [(1, 128, 20, 20)]})


def animate(dim: int = 256, seed: int = 9) -> setups.Setup:
    """Wan-Animate 2: three frames of a pose video, 432 tokens."""
    size = (1, 16, 4, 24, 24)
    shared = {
        "concat_latent_image": size,
        "concat_mask": torch.ones(1, 1, 4, 24, 24),
        "pose_video_latent": setups.random((1, 16, 3, 24, 24), seed),
    }
    return setups.wan("WAN_Animate2", "animate2", shared, (size,), in_dim=36, dim=dim, num_heads=max(dim // 128, 1), ffn_dim=2 * dim)


def drawn(setup: setups.Setup) -> Callable[..., Tensor]:
    def draw(
        model: Any, *, steps: int = STEPS, cfg: float = 3.0, callback: Any = None, positive: Any = None, negative: Any = None
    ) -> Tensor:
        import comfy.sample

        noise = setup.noise()
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "simple", positive or setup.conds(1), negative or setup.conds(2),
                torch.zeros_like(noise), denoise=1.0, seed=0, disable_pbar=True, callback=callback,
            ).float()  # fmt: skip

    return draw


def cases(host: Any) -> dict[str, Case]:
    """What this host can cache, by name."""
    if not host.real:
        import caches_fake

        draw = lambda name: (
            lambda model, *, steps=STEPS, **kw: host.sample(
                model, name, steps=steps, **{"positive": host.conds(name, 1, 300), "negative": host.conds(name, 2, 300), **kw}
            )
        )
        node = lambda m, dtype="default": caches_fake.flux_kv_cache(m)
        found = {"klein": Case(lambda: host.load("klein"), node, draw("klein"), other=host.conds("klein", 3, 300))}
        found["qwen21"] = Case(lambda: host.load("qwen21"), caches_fake.qwen_image21_cache, draw("qwen21"), ("default", "int8"))
        return {} if host.version == "0.15.1" else found
    found = {}
    try:
        from comfy_extras.nodes_flux import FluxKVCache

        setup = klein()
        node = lambda m, dtype="default": FluxKVCache.execute(m).result[0]
        (text, more), other = setup.conds(2)[0], setups.random((1, 128, 20, 20), 77)
        found["klein"] = Case(setup.model, node, drawn(setup), other=[[text, {**more, "reference_latents": [other]}]])
        from comfy_extras.nodes_wan import WanAnimate2Cache

        video = animate()
        node = lambda m, dtype="default": WanAnimate2Cache.execute(m, "cpu", dtype).result[0]
        found["animate"] = Case(video.model, node, drawn(video), ("default", "int8", "int4"))
    except ImportError:
        pass
    return found
