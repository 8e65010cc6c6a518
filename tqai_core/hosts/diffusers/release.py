"""Nothing stays held when a pipeline's loop ends by an error outside of the transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm.std import tqdm

from .clock import pipelines_on_the_stack


def running_bar() -> tqdm | None:
    """The progress bar of the loop of the pipeline that runs now."""
    return next((value for _, names in pipelines_on_the_stack() for value in names.values() if isinstance(value, tqdm)), None)


def on_failure(finish: Callable[[], None], bar: tqdm | None = None) -> None:
    """Call ``finish`` when an exception, or an interrupt, leaves the loop of the pipeline that runs now.

    Pipelines loop inside ``with self.progress_bar(...)``, and a bar is closed on every way out, also where it is not shown.
    Else nobody would tell: a callback or a scheduler that raises does not come by the transformer, and pipelines reset its hooks
    only where they come to their end.
    """
    bar = bar or running_bar()
    if bar is None:
        return
    close = bar.close

    def closed() -> None:
        vars(bar)["close"] = close
        if sys.exc_info()[0] is not None:
            finish()
        close()

    vars(bar)["close"] = closed
