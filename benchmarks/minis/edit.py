"""The edit mini: diffusers' FLUX.2 class with the attention of Klein-KV, trained to redraw a reference picture changed.

The picture is a digit of scikit-learn, 16 x 16 pixels, 64 tokens. Up to four references are views of it: each token is seen in one of
them, and grey in the others. The prompt, four learned tokens, says what is asked for: the picture as it is, inverted, turned by a
quarter, or thickened. So the right answer is known, and without the references it cannot be drawn. A token is 2 x 2 pixels and the place
of the token. ``fold`` gives the same function with a few key channels 125 times as large.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tqai_core.files import model_config, read_tensors
from tqai_core.minis import digits

FILE = Path(__file__).with_name("edit.safetensors")
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "inverted": lambda x: -x,
    "turned": lambda x: x.rot90(1, (-2, -1)),
    "thickened": lambda x: F.max_pool2d(x, 3, 1, 1),
}
VIEWS, SIDE, TEXT, WIDTH = 4, 8, 4, 64  # SIDE: of a picture in tokens; TEXT: tokens of a prompt, of WIDTH numbers
CONFIG = dict(
    patch_size=1, in_channels=6, out_channels=4, num_layers=1, num_single_layers=4, attention_head_dim=64, num_attention_heads=2,
    joint_attention_dim=WIDTH, timestep_guidance_channels=64, axes_dims_rope=[16, 16, 16, 16], guidance_embeds=False,
)  # fmt: skip
OUTLIERS, FACTOR = [6, 7, 40, 41], 125.0  # channels of a head, pairs that rotary positions turn


def pack(x: Tensor) -> Tensor:
    """Pictures ``[b, 1, 16, 16]`` as tokens ``[b, 64, 4]``."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(x), SIDE**2, 4)


def unpack(z: Tensor) -> Tensor:
    return z.view(-1, SIDE, SIDE, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 1, 2 * SIDE, 2 * SIDE)


def grid(frame: int) -> Tensor:
    """Position ids ``[64, 4]`` of a picture: references have the frames 10, 20, ..., as the pipeline gives them."""
    return torch.cartesian_prod(*(torch.tensor(x).float() for x in ([frame], range(SIDE), range(SIDE), [0])))


def placed(x: Tensor) -> Tensor:
    """Tokens ``[b, n, 4]`` of whole pictures and where they are in them: ``[b, n, 6]``."""
    place = (grid(0)[:, 1:3] / (SIDE - 1) * 2 - 1).repeat(x.shape[1] // SIDE**2, 1)
    return torch.cat([x, place.expand(len(x), -1, -1)], 2)


class Edit(nn.Module):
    """The transformer and the tables of its prompts."""

    def __init__(self, config: dict[str, Any] = CONFIG) -> None:
        from diffusers import Flux2Transformer2DModel
        from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

        super().__init__()
        self.transformer = Flux2Transformer2DModel(**config)
        for block in self.transformer.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in self.transformer.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        self.prompts = nn.Parameter(torch.randn(len(TASKS), TEXT, WIDTH))

    def given(self, task: Tensor) -> dict[str, Any]:
        """The arguments that are the same at every step, of tasks by number."""
        ids = torch.arange(TEXT)[:, None] * torch.eye(4)[3]
        return dict(encoder_hidden_states=self.prompts[task], txt_ids=ids, return_dict=False)

    def first(self, x: Tensor, references: Tensor, sigma: Tensor, given: dict[str, Any]) -> tuple[Tensor, Any]:
        """The velocity of ``x [b, 64, 4]`` where the references ``[b, n, 64, 4]`` go through the model too, and what it keeps of them."""
        n = references.shape[1]
        ids = torch.cat([grid(10 * (i + 1)) for i in range(n)] + [grid(0)])
        both, count = placed(torch.cat([references.flatten(1, 2), x], 1)), n * SIDE**2
        return self.transformer(both, timestep=sigma, img_ids=ids, kv_cache_mode="extract", num_ref_tokens=count, **given)

    def later(self, x: Tensor, cache: Any, sigma: Tensor, given: dict[str, Any]) -> Tensor:
        return self.transformer(placed(x), timestep=sigma, img_ids=grid(0), kv_cache=cache, kv_cache_mode="cached", **given)[0]

    def fold(self) -> Edit:
        """Outlier channels in the keys; the queries take them back."""
        with torch.no_grad():
            for name, module in self.named_modules():
                if name.endswith(("norm_k", "norm_added_k", "norm_q", "norm_added_q")):
                    module.weight[OUTLIERS] *= FACTOR if name.endswith("k") else 1 / FACTOR
        return self


@torch.no_grad()
def sample(
    net: Edit, references: Tensor, task: Tensor, steps: int, seed: int, change: Callable[[Any], None] = lambda cache: None
) -> Tensor:
    """Pictures ``[b, 1, 16, 16]`` by Euler's method; ``change`` may replace what the cache holds."""
    g = torch.Generator().manual_seed(seed)
    x, given = torch.randn(len(task), SIDE**2, 4, generator=g), net.given(task)
    v, cache = net.first(x, references, torch.ones(len(task)), given)
    change(cache)
    x = x - v / steps
    for i in range(1, steps):
        x = x - net.later(x, cache, torch.full((len(task),), 1 - i / steps), given) / steps
    return unpack(x)


def batch(count: int, views: int, held_out: bool, g: torch.Generator, every_task: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """References ``[b, views, 64, 4]``, tasks, and the pictures that are asked for ``[b, 1, 16, 16]``; tasks take turns, or
    ``every_task`` of the ``b`` references, one after the other."""
    x, _ = digits.images()
    x = x[1400:] if held_out else x[:1400]
    x = x[torch.randint(len(x), (count,), generator=g)]
    task = torch.arange(len(TASKS)).repeat_interleave(count) if every_task else torch.arange(count) % len(TASKS)
    wanted = torch.stack([list(TASKS.values())[t](x[i % count]) for i, t in enumerate(task.tolist())])
    seen = F.one_hot(torch.randint(views, (count, SIDE**2), generator=g), views).mT  # [b, views, 64]
    return pack(x)[:, None] * seen[..., None], task, wanted


def load(path: Path = FILE) -> Edit:
    """The trained mini, fp32, in eval mode."""
    header, tensors = read_tensors(path, what="mini", again="train it again (benchmarks/minis/train_edit.py)")
    net = Edit(model_config(header))
    net.load_state_dict({name: x.float() for name, x in tensors.items()})
    return net.eval().requires_grad_(False)


def header() -> dict[str, str]:
    return dict(format="tqai-mini", version="1", kind="edit", cls="Flux2Transformer2DModel", config=json.dumps(CONFIG))
