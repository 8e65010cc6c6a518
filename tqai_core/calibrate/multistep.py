"""The calibrated step: Adams-Bashforth 2 plus four fitted terms, and how they are fitted.

    x_next = x + h v + h^2/2 v' + theta . [h v, h^2 v', h^2 (v' - v'_before), h x]

with h the step in sigma and v' the divided difference of the last two velocities. Learned solver coefficients are known:
S4S (arXiv 2502.17423) trains coefficients and nodes by gradients from a teacher, DPM-Solver-v3 (arXiv 2310.13268) takes
statistics of the model. Here each step is a ridge least squares in closed form.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

TERMS = 4
RIDGE = 1e-4


def grid(steps: int, shift: float) -> tuple[float, ...]:
    """``steps`` falling sigmas and the final 0: the uniform grid of flow matching, shifted."""
    return tuple(float(shift * s / (1 + (shift - 1) * s)) for s in torch.linspace(1, 0, steps + 1, dtype=torch.float64))


class Multistep:
    """Steps along falling ``nodes`` (sigmas, the last one 0); plain Adams-Bashforth 2 without ``theta`` ``[steps][4]``.

    Holds the last three velocities as fp32. ``begin`` starts a trajectory, ``step`` advances it. ``student``: it runs as the
    finished sampler will, with the guidance difference forecast if that was asked for.
    """

    def __init__(self, nodes: Sequence[float], theta: Sequence[Sequence[float]] | None = None) -> None:
        self.nodes = tuple(nodes)
        self.theta = None if theta is None else [tuple(row) for row in theta]
        self.student = theta is not None
        self.begin()

    @property
    def steps(self) -> int:
        return len(self.nodes) - 1

    def begin(self) -> None:
        self.past: list[tuple[float, Tensor]] = []

    def step(self, i: int, v: Tensor, x: Tensor) -> Tensor:
        """``x`` at node i+1 in fp32, from velocity ``v`` and ``x`` at node i."""
        h, x = self.nodes[i + 1] - self.nodes[i], x.float()
        self.past = [(self.nodes[i], v.float()), *self.past[:2]]
        terms = self._terms(h, x)
        base = x + terms[0] if len(terms) == 2 else x + terms[0] + terms[1] / 2
        for weight, term in zip(self.weights(i, base, terms), terms, strict=True):
            if weight:
                base = base + weight * term
        return base

    def weights(self, i: int, base: Tensor, terms: list[Tensor]) -> list[float]:
        """One weight a term; the first two steps have no second or third slope yet."""
        if self.theta is None:
            return [0.0] * len(terms)
        row = self.theta[i]
        return [*row[: len(terms) - 1], row[-1]]

    def _terms(self, h: float, x: Tensor) -> list[Tensor]:
        """[h v, h^2 v', h^2 (v' - v'_before), h x]; what has no past is left out."""
        slopes = [(a[1] - b[1]) / (a[0] - b[0]) for a, b in zip(self.past, self.past[1:], strict=False)]
        bends = [slopes[0] - slopes[1]] if len(slopes) == 2 else []
        return [h * self.past[0][1], *(h * h * s for s in (*slopes[:1], *bends)), h * x]


class RecordingSolver(Multistep):
    """Records ``states`` at every node, on the CPU, and the ``change`` of the velocity between nodes."""

    def begin(self) -> None:
        super().begin()
        self.states: list[Tensor] = []
        self.change: list[float] = []  # |v_i+1 - v_i|^2

    def step(self, i: int, v: Tensor, x: Tensor) -> Tensor:
        if not self.states:
            self.states.append(x.float().cpu())
        out = super().step(i, v, x)
        if i:
            self.change.append(float((self.past[0][1] - self.past[1][1]).square().sum()))
        self.states.append(out.cpu())
        return out

    def at(self, sigma: float) -> Tensor:
        """The state at any sigma, by the cubic through four neighbours."""
        nodes = self.nodes
        for k, node in enumerate(nodes):
            if abs(node - sigma) < 1e-9:
                return self.states[k]
        above = sum(node > sigma for node in nodes)
        first = min(max(above - 2, 0), len(nodes) - 4)
        near = range(first, first + 4)
        out = torch.zeros_like(self.states[0])
        for k in near:
            out += math.prod((sigma - nodes[j]) / (nodes[k] - nodes[j]) for j in near if j != k) * self.states[k]
        return out


class Fit(Multistep):
    """Steps from its own states and fits each step's weights to the reference's next state. ``only`` are the steps to fit."""

    def __init__(self, nodes: Sequence[float], target: Callable[[float], Tensor], total: Callable[[Tensor], Tensor], only: Sequence[int]):
        super().__init__(nodes)
        self.student = True
        self.target, self.total, self.only = target, total, set(only)
        self.fitted: list[tuple[float, ...]] = []

    def weights(self, i: int, base: Tensor, terms: list[Tensor]) -> list[float]:
        found = [0.0] * len(terms)
        if i in self.only:
            a = torch.stack([t.flatten() for t in terms])
            miss = (self.target(self.nodes[i + 1]).to(base.device) - base).flatten()
            sums = self.total(torch.cat([a @ a.T, (a @ miss)[:, None]], 1).double().cpu())
            gram, right = sums[:, :-1], sums[:, -1]
            found = torch.linalg.solve(gram + torch.diag(RIDGE * gram.diagonal() + 1e-9), right).tolist()
        self.fitted.append((*found[:-1], *[0.0] * (TERMS - len(found)), found[-1]))
        return found


def equidistributed(nodes: Sequence[float], change: Sequence[float], steps: int) -> tuple[float, ...]:
    """``steps`` nodes and the final 0 with equal shares of the integral of |dv/dsigma|^(1/2).

    ``change[i]`` is |v_i+1 - v_i|^2 of a fine run between ``nodes`` i and i+1; the way to the final 0 goes on as before it.
    """
    widths = [a - b for a, b in pairwise(nodes)]
    density = [(c**0.5 / w) ** 0.5 for c, w in zip(change, widths, strict=False)]
    density.append(density[-1])
    shares = torch.tensor([d * w for d, w in zip(density, widths, strict=True)], dtype=torch.float64)
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)])
    out = [nodes[0]]
    for k in range(1, steps):
        goal = reached[-1] * k / steps
        i = int(torch.searchsorted(reached, goal)) - 1
        out.append(nodes[i] - float((goal - reached[i]) / shares[i]) * widths[i])
    return (*out, 0.0)


class BatchBarrier:
    """Runs batches step by step together, so that a fit sees all of them while one at a time computes.

    Each batch runs in a thread of its own and holds a lock while it computes; at ``total`` it waits for the others. A single
    batch runs in the calling thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(count, action=self._sum)
        self.parts: dict[int, Tensor] = {}

    def _sum(self) -> None:
        self.summed = reduce(torch.add, (self.parts[k] for k in sorted(self.parts)))  # in order: the same sum every time
        self.parts = {}

    def total(self, index: int, part: Tensor) -> Tensor:
        """The sum of all batches' parts, once all have arrived."""
        if self.count == 1:
            return part
        self.parts[index] = part
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return self.summed

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """All of them; the first error is raised when all have stopped."""
        if self.count == 1:
            works[0]()
            return
        errors: list[BaseException] = []

        def work(function: Callable[[], None]) -> None:
            try:
                with self.turn:
                    function()
            except threading.BrokenBarrierError:
                pass  # the error is another batch's
            except BaseException as error:  # KeyboardInterrupt too: it must reach the caller
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(function,), daemon=True) for function in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
