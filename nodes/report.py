"""Shows what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from tqai_core.closeness import Comparison
from tqai_core.report import Report, dumps

from .chart import draw
from .run_history import HISTORY, Entry, upstream
from .widgets import CATEGORY


class TQAIReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TQAIReport",
            display_name="TQAI Report",
            category=CATEGORY,
            description="Shows what TQAI Compress and TQAI Cache did: how many steps were skipped, how large the error was, how much "
            "memory was used, and why something was not changed. With the exact run linked too: how close this one is to it.",
            search_aliases=["tqai", "statistics", "speed", "chart"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("samples", tooltip="Link the sampler's latent, so that this runs after it. It passes through."),
                io.Latent.Input("exact", optional=True, tooltip="The latent of the same seed without TQAI nodes, to compare with."),
                io.Image.Input("image", optional=True, tooltip="The pictures of `samples`, to compare with `exact_image`."),
                io.Image.Input("exact_image", optional=True, tooltip="The pictures of the exact run."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The latent, unchanged."),
                io.String.Output(display_name="text", tooltip="The report as Markdown."),
                io.Image.Output(
                    display_name="chart", tooltip="A picture of what was done: which steps were skipped, the error, the memory."
                ),
                io.String.Output(display_name="json", tooltip="The same figures as JSON."),
                io.Image.Output(
                    display_name="difference",
                    tooltip="The worst picture or frame: white where it differs most from the exact run's. Black without one.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """Always run: the sampler before it may have, while the graph stayed the same."""
        return time.time()

    @classmethod
    def execute(cls, samples: dict[str, Any], exact: Any = None, image: Any = None, exact_image: Any = None) -> io.NodeOutput:
        before = upstream(cls.hidden.prompt, cls.hidden.unique_id, "samples")  # what made the exact run is not reported
        # another workflow of this session may have used the same ids for other nodes
        entries = [e for e in HISTORY.of(before) if _belongs(e, cls.hidden.prompt)] if before else HISTORY.last()
        against = Comparison.of(_pairs(samples, exact, image, exact_image))
        if (image is None) != (exact_image is None):
            against.notes.append("image and exact_image are compared with each other: link both")
        text, chart = against.to_markdown() + _text(entries), draw(entries)
        told = [{"node": e.patch, "sampler": e.sampler, "model": e.family, "done": e.done, **e.report} for e in entries]
        close = {name: asdict(row) for name, row in against.rows.items()}
        data = dumps([{**entry, "exact": close} if close else entry for entry in told])
        grey = against.difference[None, :, :, None].repeat(1, 1, 1, 3)  # as ComfyUI's IMAGE
        previews = [ui.PreviewImage(picture, cls=cls).as_dict() for picture in ([chart, grey] if close else [chart])]
        shown = {**ui.PreviewText(text).as_dict(), **previews[0], "images": [saved for p in previews for saved in p["images"]]}
        shown["closeness"] = [{"node": e.patch, "text": against.short([*close][-1])} for e in entries if close]
        return io.NodeOutput(samples, text, chart, data, grey, ui=shown)


def _pairs(samples: Any, exact: Any, image: Tensor | None, exact_image: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is compared with what, channels second."""
    if exact is not None:  # video with sound is a nest of latents
        ours, theirs = ([*t.unbind()] if getattr(t, "is_nested", False) else [t] for t in (samples["samples"], exact["samples"]))
        yield from ((f"latent {i + 1}" if i else "latent", *pair) for i, pair in enumerate(zip(ours, theirs, strict=False)))
    if image is not None and exact_image is not None:
        yield "picture", image.movedim(-1, 1), exact_image.movedim(-1, 1)


def _text(entries: list[Entry]) -> str:
    if not entries:
        return (
            "No sampling with TQAI Compress or TQAI Cache has run before this node: it is off, not linked, or nothing was sampled since "
            "the start."
        )
    return "\n".join(f"### {e.head}{'' if e.done else ' (stopped before its end)'}\n\n{Report(**e.report).to_markdown()}" for e in entries)


def _belongs(entry: Entry, prompt: dict[str, Any]) -> bool:
    """Whether a sampling is one of this graph: its node of ours stands before its sampler, and is of the kind that made the report."""
    kind = "TQAICache" if entry.cache else "TQAICompress"
    return entry.patch in upstream(prompt, entry.sampler) and prompt[str(entry.patch)].get("class_type", kind) == kind
