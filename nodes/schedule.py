"""Where a ComfyUI sampler is: time by sigma, history by evaluation. Knows no host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tqai_core.types import Step


@dataclass(frozen=True)
class Schedule:
    """The sigmas one sampler node goes through, and what they are a part of.

    A second expert, img2img and "end at step" see a slice only: ``total`` is the number of steps the whole way from noise
    to image would have at this pace. Samplers may evaluate a sigma twice (Heun) or one between two (2S); so the place is
    found by the nearest sigma, and the index of a step counts evaluations.
    """

    sigmas: tuple[float, ...]
    total: float

    @staticmethod
    def of(sigmas: Sequence[float], percent_to_sigma: Callable[[float], float]) -> Schedule | str:
        """From a sampler's sigmas, or the reason why they tell nothing. ``percent_to_sigma`` falls from percent 0 to 1."""
        if len(sigmas) < 2 or not all(a > b for a, b in pairwise(sigmas)):
            return "the sampler's sigmas do not fall from step to step"
        span = _percent(sigmas[-1], percent_to_sigma) - _percent(sigmas[0], percent_to_sigma)
        if span <= 0:
            return "the sampler's sigmas lie outside the model's range"
        return Schedule(tuple(sigmas), (len(sigmas) - 1) / span)

    def has(self, sigma: float) -> bool:
        """Whether ``sigma`` is one of the schedule, and not between two."""
        return min(abs(known - sigma) for known in self.sigmas) <= 1e-4

    def step(self, index: int, sigma: float) -> Step:
        """The evaluation at ``sigma``; the last ones are those at the sigma from which the sampler steps to 0."""
        at = min(range(len(self.sigmas) - 1), key=lambda i: abs(self.sigmas[i] - sigma))
        width = (self.sigmas[at] - self.sigmas[at + 1]) * self.total
        last = self.sigmas[-1] == 0 and sigma <= self.sigmas[-2] * (1 + 1e-5)
        once = at == index and abs(self.sigmas[at] - sigma) <= 1e-5 * max(sigma, 1e-5)  # each sigma was evaluated once so far
        return Step(index, sigma, max(round(self.total), 1), last, width, self.sigmas[at + 1] if once else None)


def _percent(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The reverse of a falling function on [0, 1], by bisection: its shift is the host's business."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2
