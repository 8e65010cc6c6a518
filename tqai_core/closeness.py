"""How close a run is to the exact run of the same seed: figures and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import psnr, ssim

HEAD = ("to the exact run", "PSNR", "SSIM", "largest error")


@dataclass(frozen=True)
class Closeness:
    """``psnr`` in dB (inf when equal), ``ssim`` at most 1 (nan where a side has under 7 pixels), and the ``largest`` error of one number
    as a share of the exact one's max - min."""

    psnr: float
    ssim: float
    largest: float

    @classmethod
    def of(cls, x: Tensor, exact: Tensor) -> Closeness:
        """Of two pictures, videos or latents of one shape, height and width last."""
        exact = exact.float()
        error, peak = float((x.float() - exact).abs().max()), float(exact.max() - exact.min())
        return cls(psnr(x, exact), ssim(x, exact), error / peak if peak else math.inf if error else 0.0)

    @property
    def identical(self) -> bool:
        return self.largest == 0

    def cells(self) -> list[str]:
        """The cells of a table under ``HEAD``, without the first one."""
        same = "1" if self.identical else "none" if math.isnan(self.ssim) else f"{self.ssim:.4f}"
        return ["identical" if self.identical else f"{self.psnr:.1f} dB", same, f"{self.largest:.2%} of the range"]


def difference(x: Tensor, exact: Tensor) -> Tensor:
    """The mean error of the channels as a grey picture ``[h, w]``, 1 where it is largest: of the worst picture or frame of
    ``[n, c, (frames,) h, w]``."""
    error = (x.float() - exact.float()).abs().nan_to_num()
    error = error.mean(1) if error.ndim > 3 else error  # sound is [n, c, time]
    error = error.flatten(0, -3)
    worst = error[int(error.flatten(1).amax(1).argmax())]
    return worst / worst.max().clamp_min(1e-12)


@dataclass(frozen=True)
class Comparison:
    """``rows``: how close each thing is, the one that counts most last. ``notes``: what could not be compared, and the cure.
    ``difference``: where the runs differ, ``[h, w]``."""

    rows: dict[str, Closeness]
    notes: list[str]
    difference: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> Comparison:
        """Of (name, this run's, the exact run's), both ``[n, c, (frames,) h, w]``."""
        rows: dict[str, Closeness] = {}
        notes, picture = [], torch.zeros(64, 64)
        for name, x, exact in pairs:
            if x.shape != exact.shape:
                shapes = f"{[*x.shape]} here, {[*exact.shape]} in the exact run"
                notes.append(f"{name} not compared: {shapes}; link a run of the same size, batch and length")
                continue
            exact = exact.to(x.device)
            if x.ndim > 3 or not rows:  # sound is no picture: that of the video beside it stays
                picture = difference(x, exact).cpu()
            rows[name] = Closeness.of(x, exact)
        return cls(rows, notes, picture)

    def short(self, name: str) -> str:
        row = self.rows[name]
        return "identical to exact" if row.identical else f"{row.psnr:.1f} dB to exact"

    def table(self) -> list[list[str]]:
        return [[name, *row.cells()] for name, row in self.rows.items()]

    def to_markdown(self) -> str:
        lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *self.table())] if self.rows else []
        return "".join(f"{line}\n" for line in [*lines, *self.notes])
