"""Pages as a parser sees them. test_browser.py looks at the same ones in a browser."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample_pages
from sample_pages import SCRIPT

from tqai_core import demo, plot
from tqai_core.calibrate.page import heat_map
from tqai_core.pages import FOLDER, said
from tqai_core.plot import DARK, PAPER, chart

OURS = (FOLDER / "page.js").read_text()


class Page(HTMLParser):
    """Tags with their attributes and the tags around them, and the text of each element."""

    VOID = {"meta", "img", "input", "br", "link"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict, tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs), tuple(self._open)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and self._open:
            self.texts.append((self._open[-1], data.strip()))

    def all(self, tag):
        return [(attrs, around) for name, attrs, around in self.seen if name == tag]

    def words(self, tag):
        return [text for inside, text in self.texts if inside == tag]


@pytest.fixture
def pages(tmp_path):
    return {name: Page(path.read_text()) for name, path in sample_pages.write_all(tmp_path).items()}


def test_every_page_fits_its_reader_and_loads_nothing_from_elsewhere(pages):
    for name, page in pages.items():
        assert ({"lang": "en"}, ()) in page.all("html"), name
        (viewport,) = [attrs for attrs, _ in page.all("meta") if attrs.get("name") == "viewport"]
        assert viewport["content"] == "width=device-width, initial-scale=1"
        (style,) = page.words("style")
        assert "prefers-color-scheme: dark" in style
        assert not re.search(r"url\(|@import|https?:", style)
        for tag, attrs, around in page.seen:
            for place in ("src", "href"):
                assert not re.match("[a-z]+:|//", attrs.get(place) or ""), (name, tag, attrs)
            assert tag != "table" or around[-1] == "div"
            assert not [key for key in attrs if key.startswith("on")], "a handler in an attribute"
        scroll = [attrs for attrs, _ in page.all("div") if attrs.get("class") == "scroll"]
        assert len(scroll) >= len(page.all("table"))
        assert all(attrs.get("alt") for attrs, _ in page.all("img"))
        assert all(attrs.get("aria-label") for attrs, _ in page.all("input"))


def test_no_value_is_shown_as_json(pages):
    for name, page in pages.items():
        for text in page.words("td") + page.words("h2"):
            assert not re.search(r"[\[\]{}]|\bnull\b|\"", text), (name, text)
    assert said({"torch": "2.13", "of": [1, 2]}) == "torch 2.13, of 1, 2"
    assert [said(value) for value in (None, [], True, 0.123456, "a")] == ["none", "none", "yes", "0.1235", "a"]


def test_a_script_in_any_field_is_text(tmp_path):
    plain = {name: Page(path.read_text()) for name, path in sample_pages.write_all(tmp_path).items()}
    for name, path in sample_pages.write_all(tmp_path, SCRIPT).items():
        html = path.read_text()
        page = Page(html)
        inside = [text for tag, text in page.texts if tag == "script"]
        assert inside == ([OURS.strip()] if name in ("compare", "try") else []), name
        assert {tag for tag, *_ in page.seen} == {tag for tag, *_ in plain[name].seen}, "no other tags than without"
        if name != "calibration":
            assert SCRIPT in "".join(text for _, text in page.texts), "shown as it is written"
            assert html.count("&lt;script") >= (5 if name == "study" else 12)


def test_a_demo_page_says_what_was_asked_how_far_off_it_is_and_moves_in_step(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 16)
    page = Page(sample_pages.small_demo(tmp_path).read_text())
    assert "tqai balanced computed" in page.words("p")[0], "a sentence on top"
    assert "Asked for: 0 1" in page.words("h3")
    clips = [attrs for attrs, around in page.all("img") if around[-1] == "div"]
    assert len(clips) == 4 + 3 + 2
    assert {attrs["style"] for attrs in clips} == {"animation-timing-function:steps(9)"}, "nine frames each, one clock"
    assert page.words("figcaption").count("difference to exact, times ten") == 3
    (slide,) = page.all("input")
    assert slide[0]["type"] == "range"
    bars = [attrs["style"] for attrs, _ in page.all("i")]
    assert len(bars) == 4
    assert bars[0].endswith("width:62.0%") or max(float(re.search(r"[\d.]+", bar)[0]) for bar in bars) == 62.0


def test_the_chart_has_the_tolerance_and_a_legend_beside_the_points():
    for width in (760, 350):
        drawing = chart(sample_pages.report().decisions, width)
        high = int(re.search(r'height="(\d+)', drawing)[1])
        assert drawing.count('stroke-dasharray="4 3"') == 24 + 1, "a piece a step, one in the legend"
        words = [(float(x), float(y), text) for x, y, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)', drawing)]
        legend = [place for place in words if place[1] > 180]
        assert [text.split()[0] for *_, text in legend] == ["computed", "forecast", "error", "its", "tolerance:"]
        assert all(x + 6.6 * len(text) <= width for x, _, text in legend)
        assert max(y for _, y, _ in legend) < high
        steps = [x for x, y, text in words if text.isdigit()]
        assert min(b - a for a, b in itertools.pairwise(steps)) >= 24, "labels do not run into each other"
        assert set(re.findall(r'(?:fill|stroke)="(#\w+)"', drawing)) <= {*DARK}, "each colour has one for the dark"
    plain = [d | {"tolerance": None} for d in sample_pages.report().decisions]
    assert "tolerance:" not in chart(plain)
    assert "tolerance:" not in chart([{key: value for key, value in d.items() if key != "tolerance"} for d in plain])


def test_a_heat_map_says_what_its_shades_mean():
    drawing = heat_map([[0.001, 0.1], [1.0, 10.0]], "keys")
    assert ">0.001<" in drawing
    assert ">10<" in drawing
    assert "rgb(245,245,245)" in drawing
    assert "rgb(31,95,168)" in drawing
    flat = heat_map([[4.0, 4.0]], "bits", log=False)
    assert flat.count(">4<") == 4, "two cells, two ends of the scale"


def test_colours_for_the_dark_can_be_told_apart():
    def light(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        line = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]

    for name in ("INK", "BLUE", "ORANGE"):
        for colour, paper in ((getattr(plot, name), PAPER), (DARK[getattr(plot, name)], DARK[PAPER])):
            high, low = sorted((light(colour), light(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, name


def test_templates_are_part_of_the_package():
    import tomllib

    tools = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "templates/*" in tools["package-data"]["tqai_core"]
    assert {path.name for path in FOLDER.iterdir()} >= {"base.html", "style.css", "page.js", "demo.html", "compare.html", "study.html"}
