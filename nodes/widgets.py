"""The registry as widgets: choosing a method shows its own typed, bounded options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from tqai_core.registry import REGISTRY, names

from .files import tables

PIPELINE = io.Custom("TQAI_PIPELINE")
CATEGORY = "tqai"
EMPTY = "no file yet"  # the one choice where there is no file


def verdict(check: Callable[[], Any]) -> bool | str:
    """What ``validate_inputs`` returns: True, or what ``check`` complains of."""
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return True


def dropdown(role: str, default: str, tooltip: str, extra: tuple[str, ...] = ()) -> Any:
    """A dynamic combo of the methods of ``role``; the page takes the first one as default, so that comes first."""
    order = [default, *extra, *(name for name in names(role) if name != default)]
    options = [io.DynamicCombo.Option(name, _options(role, name)) for name in dict.fromkeys(order)]
    return io.DynamicCombo.Input(role, options=options, tooltip=tooltip)


def pipeline_input(optional: bool = True) -> Any:
    return PIPELINE.Input(
        "pipeline",
        optional=optional,
        tooltip="What other tqai nodes have set so far; left open, preset balanced is the base." if optional else None,
    )


def _options(role: str, name: str) -> list[Any]:
    cls = REGISTRY[role].get(name)
    return [] if cls is None else [_widget(key, option) for key, option in cls.options().items() if option["level"] != "kv"]


def _widget(key: str, option: dict[str, Any]) -> Any:
    """Optional, so that a workflow saved before the option was there still runs; left out, it is the method's default."""
    kind, default, low, high = option["type"], option["default"], option["low"], option["high"]
    tooltip = option["help"]
    if key == "file":
        return io.Combo.Input(key, options=tables() or [""], tooltip=f"{tooltip}; from ComfyUI's folder models/tqai")
    if option["choices"]:
        return io.Combo.Input(key, options=[str(c) for c in option["choices"]], default=str(default), optional=True, tooltip=tooltip)
    if kind is bool:
        return io.Boolean.Input(key, default=default, optional=True, tooltip=tooltip)
    if kind is int:
        whole = [None if limit is None else int(limit) for limit in (low, high)]
        return io.Int.Input(key, default=default, min=whole[0], max=whole[1], optional=True, tooltip=tooltip)
    if kind is float:
        step = 10.0 ** -max(len(f"{default:g}".partition(".")[2]), 1)  # of the size of its last digit: .06 moves by .01, 2.0 by .1
        return io.Float.Input(key, default=default, min=low, max=high, step=step, round=False, optional=True, tooltip=tooltip)
    text = "+".join(map(str, default)) if kind is tuple else "" if default is None else str(default)
    return io.String.Input(key, default=text, optional=True, tooltip=tooltip)
