"""What a ComfyUI model's latent and prediction are in terms of a flow: ``x_t = (1 - t) x0 + t noise``, velocity ``noise - x0``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_sampling
from torch import Tensor

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class Parametrisation:
    """A flow-matching model. ``scaled``: the host's sigma is ``t / (1 - t)`` and its latent ``x_t / (1 - t)``. An Euler step of the
    host is one of the flow in both forms."""

    scaled: bool

    def time(self, sigma: T) -> T:
        return sigma / (1 + sigma) if self.scaled else sigma

    def velocity(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
        """Of the latent ``x [b, ...]`` and the picture that the model predicts at ``sigma [b]``."""
        x, t = self._flow(x, sigma)
        return (x - denoised) / t

    def denoised(self, x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
        """The reverse of :meth:`velocity`."""
        x, t = self._flow(x, sigma)
        return x - velocity.to(x.dtype) * t

    def latent(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The flow's latent ``x_t`` of the host's."""
        return self._flow(x, sigma)[0]

    def host(self, latent: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The host's latent and sigma of the flow's latent ``[b, ...]`` at ``time [b]``: the reverse of :meth:`latent` and :meth:`time`."""
        if not self.scaled:
            return latent, time
        t = time.reshape(time.shape[:1] + (1,) * (latent.ndim - 1))
        return latent / (1 - t), time / (1 - time)

    def _flow(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        t = self.time(sigma.reshape(sigma.shape[:1] + (1,) * (x.ndim - 1)) if sigma.ndim == 1 else sigma)
        return (x * (1 - t) if self.scaled else x), t


def of(model: Any) -> Parametrisation | str:
    """The parametrisation of a ModelPatcher, or the reason why it is no flow. What counts is the very method that makes a picture of the
    model's output: a class that derives from a flow's may have another one."""
    sampling = model.get_model_object("model_sampling")
    found = next(cls for cls in type(sampling).__mro__ if "calculate_denoised" in vars(cls))
    name = type(getattr(model.model, "model_config", model.model)).__name__  # SD1.5's own class is called BaseModel
    known = {getattr(comfy.model_sampling, kind, None): kind == "COSMOS_RFLOW" for kind in ("CONST", "COSMOS_RFLOW")}
    if found not in known:
        return f"{name} is no flow-matching model: its output is read as {found.__name__}, and tqai forecasts the velocities of flows alone"
    flow, highest = Parametrisation(known[found]), float(getattr(sampling, "sigma_max", 1.0))
    if flow.time(highest) > 1 + 1e-3:
        return f"{name} is no flow-matching model: its sigmas go up to {highest:g}, those of a flow to 1"
    return flow
