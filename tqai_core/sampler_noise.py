"""Whether a sampler adds noise of its own: measured, not told by its name."""

from __future__ import annotations

import torch
from torch import Tensor

COORDINATES = 8192  # of the latent that are looked at
LOOKS = 4  # latents after the first one that are looked at
LEAST = 0.02  # part of a latent that rounding does not explain


class NoiseMeter:
    """A deterministic solver, of any order, makes each latent from the first one and the model's outputs: it lies in their span.
    The part outside of it is noise that the sampler added.

    Args:
        inpainting: the host puts another picture into a part of each latent, which lies in no span: nothing is looked at.
    """

    def __init__(self, inpainting: bool = False) -> None:
        self.share = 0.0
        self._known: list[Tensor] = []  # fp64 [coordinates], the first latent and the outputs so far
        self._looks = LOOKS if inpainting else 0

    @property
    def done(self) -> bool:
        return self._looks >= LOOKS or self.share > LEAST

    def latent(self, x: Tensor) -> float:
        """The latent ``x`` that the model is about to see; returns the largest share of noise in one so far, in [0, 1]."""
        if self.done:
            return self.share
        now = self._sketch(x)
        if not bool(torch.stack([v.isfinite().all() for v in (now, *self._known)]).all()):
            self._looks = LOOKS  # the flow gives up such a run by itself
        elif not self._known:
            self._known = [now]
        elif now.numel() >= 4 * len(self._known):
            basis = torch.stack(self._known, 1)
            rest = now - basis @ torch.linalg.lstsq(basis, now[:, None]).solution[:, 0]
            self.share = max(self.share, float(rest.norm() / now.norm().clamp_min(1e-30)))
            self._looks += 1
        if self.done:
            self._known = []
        return self.share

    def output(self, x: Tensor) -> None:
        """What the model, or the guider, made of the last latent: of the whole, not of an area of it."""
        if not self.done and self._known and x.numel() and len(now := self._sketch(x)) == len(self._known[0]):
            self._known.append(now)

    def _sketch(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten()
        return flat[:: max(flat.numel() // COORDINATES, 1)].cpu().double()
