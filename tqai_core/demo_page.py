"""The page and the pictures of ``tqai demo``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor

from .measure import Mini, Run, each
from .metrics import psnr
from .pages import Media, Shown, render
from .plot import charts

ZOOM = 3  # of a 16 x 16 digit on the page
TENFOLD = 10  # a difference of a tenth of the range is white
FAR = 6.0  # dB under the median of its batch: a picture that is told of by name
OURS = "tqai balanced"
FRAME = 160  # milliseconds


def section(mini: Mini, labels: Sequence[int], runs: Mapping[str, Run], rows: Mapping[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """What the page shows of a mini. Its pictures and its chart are written as files too, which the README takes."""
    exact = mini.pixels(runs["exact"].latents)
    shown = []
    for method, run in runs.items():
        x, row = mini.pixels(run.latents), rows[method]
        _save(x, out / f"{mini.kind}-{method.replace(' ', '-')}")
        lines = [f"{row['calls']} model calls, {run.seconds:.2f} s"]
        lines += [] if row["psnr"] is None else [f"{row['psnr']:.1f} dB, least {row['psnr_worst']:.1f}"]
        differ = [] if method == "exact" else [_still(TENFOLD * (x.clamp(-1, 1) - exact.clamp(-1, 1)).abs() - 1)]
        shown.append(Shown(method, lines, [_still(x)], differ))
    decisions = runs[OURS].report.decisions  # type: ignore[union-attr]
    drawings = charts(decisions)
    (out / f"{mini.kind}-decisions.svg").write_text(drawings[0])
    bars = [(name, run.seconds, f"{run.seconds:.2f} s, {rows[name]['calls']} calls") for name, run in runs.items()]
    return {
        "name": mini.kind, "verdict": _verdict(rows), "times": bars, "asked": _asked(labels), "pictures": shown, "charts": drawings,
        "outliers": list(_outliers(mini, labels, runs)),
    }  # fmt: skip


def page(kinds: Sequence[dict[str, Any]], place: str) -> str:
    return render("demo", title="tqai demo", kinds=kinds, place=place, verdict=" ".join(f"{k['name']}: {k['verdict']}" for k in kinds))


def _verdict(rows: Mapping[str, dict[str, Any]]) -> str:
    ours, exact, fewer = (rows[name] for name in (OURS, "exact", "fewer steps"))
    return (
        f"{OURS} computed {ours['calls']} of {exact['calls']} model calls and took {1 / ours['cpu_ratio']:.0%} of the time; it is "
        f"{ours['psnr']:.1f} dB close to the exact result, a run of fewer steps with as many calls {fewer['psnr']:.1f} dB."
    )


def _asked(labels: Sequence[int]) -> str:
    lines = [" ".join(map(str, labels[i : i + 5])) for i in range(0, len(labels), 5)]
    return ", then ".join(lines)


def _outliers(mini: Mini, labels: Sequence[int], runs: Mapping[str, Run]) -> Any:
    """Pictures that lie far below the others of their batch, and what the judge reads in them."""
    read = {name: mini.labels(run.latents).view(len(labels), -1).mode(1).values.tolist() for name, run in runs.items()}
    for name, run in runs.items():
        if name == "exact":
            continue
        found = each(psnr, run.latents, runs["exact"].latents)
        middle = median(found)
        for i, value in enumerate(found):
            was, now = read["exact"][i], read[name][i]
            if value < middle - FAR or was != now:
                side = "below" if value < middle else "above"
                words = f"{name}, the {labels[i]}: {value:.1f} dB, {abs(middle - value):.1f} dB {side} the median"
                same = f"it still reads as {now}" if was == now else f"it reads as {now}, the exact one as {was}"
                yield f"{words} of its batch; {same}. A run that lies between two pictures is decided by its first steps."


def _frames(x: Tensor) -> list[Image.Image]:
    return [_strip(frame) for frame in rearrange(x, "n 1 ... h w -> (...) n h w")]


def _still(x: Tensor) -> Media:
    """``x`` ``[n, 1, (frames,) 16, 16]`` in [-1, 1]; larger is white."""
    frames = _frames(x)
    width, height = frames[0].size
    sheet = Image.new("L", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (0, i * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return Media(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", len(frames), width, height, pixels=True)


def _save(x: Tensor, path: Path) -> None:
    """A strip of digits as PNG, or of clips as an animated GIF."""
    first, *rest = _frames(x)
    if rest:
        first.save(path.with_suffix(".gif"), save_all=True, append_images=rest, duration=FRAME, loop=0)
    else:
        first.save(path.with_suffix(".png"))


def _strip(x: Tensor) -> Image.Image:
    """Digits ``[n, 16, 16]`` in [-1, 1], side by side in rows of five."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    image = Image.fromarray(rearrange(levels, "(row column) h w -> (row h) (column w)", column=min(len(x), 5)).numpy())
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
