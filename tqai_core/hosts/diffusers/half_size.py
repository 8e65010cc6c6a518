"""One call of a diffusers transformer at half the height and width: its arguments made smaller, its output made larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from einops import rearrange
from torch import Tensor

from ...families import TIMES
from ...half_size import HalfSize, reduce, why_full
from .outputs import Form

CLOSE = 2e-3  # difference of a time argument from what its sigma makes of it, relative: bf16 timesteps
PATCH = 2  # side of the patches that pipelines pack into a token
SAFE = {"return_dict", "guidance", "pooled_projections", "encoder_hidden_states", "encoder_hidden_states_mask", "encoder_attention_mask",
        "txt_ids", "txt_seq_lens", "cap_feats", "attention_kwargs", "joint_attention_kwargs", "patch_size", "f_patch_size",
        "encoder_hidden_states_2", "encoder_attention_mask_2", "encoder_hidden_states_t5", "prompt_masks", "attention_mask"}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the latents lie in a call.

    Attributes:
        name: the argument that holds them.
        tokens: rows and columns of the tokens, 2 x 2 latents each; None where latents ``[..., h, w]`` are given as they are.
        listed: a list of pictures.
        places: arguments that tell the places of half as many tokens in each direction.
    """

    name: str
    tokens: tuple[int, int] | None
    listed: bool
    places: Mapping[str, Any]

    def unpack(self, x: Any) -> Tensor:
        """The argument as latents ``[..., h, w]``."""
        x = torch.stack(x) if self.listed else x
        return x if self.tokens is None else _unpacked(x, *self.tokens)

    def pack(self, small: Tensor) -> Any:
        """Latents as the argument."""
        return list(small.unbind()) if self.listed else small if self.tokens is None else _packed(small)

    def unpack_output(self, velocity: Tensor, small: Tensor) -> Tensor:
        """The model's output as ``small`` is."""
        if self.tokens is not None:
            return _unpacked(velocity, small.shape[-2] // PATCH, small.shape[-1] // PATCH)
        return velocity.reshape(small.shape)

    def pack_output(self, velocity: Tensor, like: Tensor) -> Tensor:
        """The velocity of full size in the form of the model's output ``like``."""
        return _packed(velocity) if self.tokens is not None else velocity.reshape(*like.shape[:-2], *velocity.shape[-2:])


def _unpacked(x: Tensor, h: int, w: int) -> Tensor:
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=PATCH, q=PATCH)


def _packed(x: Tensor) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def layout_of(model: Any, given: Mapping[str, Any]) -> Layout | str:
    """The layout of a call, or why it cannot be made at half size."""
    name = "hidden_states" if "hidden_states" in given else "x"
    x, made = given.get(name), None
    if isinstance(x, list) and x and all(isinstance(part, Tensor) and part.shape == x[0].shape for part in x):
        made = Layout(name, None, True, {})
    elif isinstance(x, Tensor) and x.ndim in (4, 5):
        made = Layout(name, None, False, {})
    elif isinstance(x, Tensor) and x.ndim == 3:
        made = _of_tokens(name, x, given)
        if made is None:
            return "its tokens are not those of one picture alone"
    if made is None:
        return "its latents have an unknown form"
    patch = getattr(getattr(model, "config", None), "patch_size", PATCH)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    known = {name, *TIMES, "img_ids", "img_shapes", *SAFE}
    others = [key for key, value in given.items() if key not in known and value is not None]
    return why_full(made.unpack(x).shape[-2:], patch if isinstance(patch, int) else PATCH, others) or made


def _of_tokens(name: str, x: Tensor, given: Mapping[str, Any]) -> Layout | None:
    """The tokens of Flux, with their places as ``img_ids``, or of Qwen-Image, with ``img_shapes``; None for others."""
    ids, shapes = given.get("img_ids"), given.get("img_shapes")
    places: dict[str, Any] | None = None
    h = w = 0
    if isinstance(ids, Tensor):
        flat = ids[0] if ids.ndim == 3 else ids
        h, w = (int(n) + 1 for n in flat[-1, 1:3].tolist())
        if flat.shape == (h * w, 3):
            small = flat.reshape(h, w, -1)[: h // 2, : w // 2].reshape(-1, flat.shape[-1])
            places = {"img_ids": small if ids.ndim == 2 else small.expand(len(ids), -1, -1)}
    elif isinstance(shapes, list) and shapes and all(shape == shapes[0] for shape in shapes):
        listed = isinstance(shapes[0], list)
        frames, h, w = shapes[0][0] if listed else shapes[0]
        if frames == 1 and not (listed and len(shapes[0]) > 1):
            half = (1, h // 2, w // 2)
            places = {"img_shapes": [[half] if listed else half] * len(shapes)}
    if places is None or x.shape[1] != h * w or x.shape[2] % PATCH**2:
        return None
    return Layout(name, (h, w), False, places)


@dataclass(frozen=True)
class Time:
    """The time argument as a function of sigma: ``scale * sigma``, or ``scale * (1 - sigma)`` where time runs upwards and the output
    is the velocity's negative."""

    name: str
    scale: float
    upwards: bool

    def at(self, like: Any, sigma: float) -> Any:
        value = self.scale * (1 - sigma if self.upwards else sigma)
        return torch.full_like(like, value) if isinstance(like, Tensor) else value


def time_of(given: Mapping[str, Any], sigma: float) -> Time | None:
    """By the value that a call has at a ``sigma`` that the scheduler knows."""
    names = [name for name in TIMES if given.get(name) is not None]
    if len(names) != 1:
        return None
    value = given[names[0]]
    if isinstance(value, Tensor):
        if value.ndim > 1 or bool((value != value.flatten()[0]).any()):
            return None
        value = value.flatten()[0].item()
    for scale in (1.0, 1000.0):
        for upwards in (False, True):
            if abs(value - scale * (1 - sigma if upwards else sigma)) <= CLOSE * scale:
                return Time(names[0], scale, upwards)
    return None


class HalfSizeCall:
    """Calls of one transformer at half size. What its arguments mean is found once a generation."""

    def __init__(self, model: Any, state: HalfSize, refused: Callable[[str], None]) -> None:
        self.state, self.refused = state, refused
        state.model = self.model = ref(model)
        self.begin()

    def begin(self) -> None:
        self.time: Time | None = None
        self._last: tuple[Any, ...] = ()  # what the layout was found from: reading ids of tokens is a host sync
        self._layout: Layout | str = ""

    def prepare(self, given: Mapping[str, Any], sigma: float) -> Layout | str:
        """The layout of a call at ``sigma``, or why it has full size."""
        last = (given.get("img_ids"), tuple(sorted(name for name, value in given.items() if value is not None)))
        if not self._last or self._last[0] is not last[0] or self._last[1] != last[1]:
            self._last, self._layout = last, layout_of(self.model(), given)
        layout = self._layout
        self.time = self.time or time_of(given, sigma)
        return layout if self.time is not None else "its time argument does not tell the scheduler's sigma"

    def __call__(self, layout: Layout, compute: Callable[..., Any], given: Mapping[str, Any], sigma: float) -> Any:
        """The output at full size, from the model's own at half size."""
        time = cast(Time, self.time)
        x = layout.unpack(given[layout.name])
        small, small_sigma = reduce(x, sigma)
        changed = {layout.name: layout.pack(small), time.name: time.at(given[time.name], small_sigma), **layout.places}
        form, tensors = Form.of(compute(**{**given, **changed}))
        sign, out = -1 if time.upwards else 1, tensors[0]
        clean = small.float() - small_sigma * sign * layout.unpack_output(out, small).float()
        if self.state.judges(sigma):
            return self._judged(layout, x, sigma, compute(**given), clean, sign)
        velocity = sign * self.state.velocity(x, sigma, clean, small_sigma)
        return form.filled([layout.pack_output(velocity.to(out.dtype), out), *tensors[1:]])

    def _judged(self, layout: Layout, x: Tensor, sigma: float, output: Any, clean: Tensor, sign: int) -> Any:
        """The output of full size, after the two sizes were compared."""
        velocity = sign * layout.unpack_output(Form.of(output)[1][0], x)
        if (why := self.state.judge(x.float() - sigma * velocity.float(), clean, sigma)) is not None:
            self.refused(why)
        return output
