"""HTML pages: one base, one stylesheet, nothing loaded from elsewhere. Whatever a template is given is text, never markup, unless it is a
:class:`~tqai_core.plot.Drawing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .plot import DARK

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Media:
    """A picture or a film of a page. ``frames`` of a clip may lie one below the other, each ``wide`` x ``high``."""

    src: str
    frames: int = 1
    wide: int = 0
    high: int = 0
    pixels: bool = False


@dataclass(frozen=True)
class Shown:
    """A result with what is said of it, and where it differs from the exact one."""

    name: str
    lines: Sequence[str]
    files: Sequence[Media]
    differences: Sequence[Media] = ()

    @classmethod
    def beside(cls, name: str, lines: Sequence[str], files: Sequence[str], differences: Sequence[str] = ()) -> Shown:
        """Of files that lie beside the page."""
        return cls(name, lines, *([Media(quote(Path(file).name)) for file in some] for some in (files, differences)))


FOLDER = Path(__file__).with_name("templates")


def render(template: str, **what: Any) -> str:
    """The page ``templates/<template>.html`` about ``what``. It has no script unless it asks for ``page.js``."""
    return _environment().get_template(f"{template}.html").render(dark=DARK, **what)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["said"] = said
    made.globals["own"] = lambda name: Markup((FOLDER / name).read_text(encoding="utf-8"))  # style and script: files of the package
    return made


def said(value: Any) -> str:
    """A value of a file as a person writes it: no brackets, no quotes, ``none`` for what is not there."""
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(part)}" for key, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(said, value))
    return str(value)
