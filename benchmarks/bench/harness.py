"""What the benches share beside :mod:`tqai_core.measure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqai_core.measure import Mini, Run, compare, machine, one_thread

__all__ = ["Mini", "Run", "compare", "machine", "one_thread", "promises"]


def promises(out: list[dict[str, Any]], **more: Any) -> Callable[..., None]:
    """``need(what, measured, least=None, most=None)``, which puts a promise beside what was measured at the end of ``out``, with
    ``more`` in the row; None: not measured, not kept."""

    def need(what: str, measured: float | None, least: float | None = None, most: float | None = None) -> None:
        ok = measured is not None and (least is None or measured >= least) and (most is None or measured <= most)
        bound = f">= {least:g}" if least is not None else f"<= {most:g}"
        out.append({**more, "what": what, "measured": measured, "needed": bound, "ok": bool(ok)})

    return need
