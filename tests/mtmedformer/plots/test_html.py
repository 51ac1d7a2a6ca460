"""The HTML page of the reports: well-formed, self-contained, and safe with any names in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from mtmedformer.plots.html import (
    Html,
    ShadedCell,
    code,
    details,
    facts,
    figure,
    join,
    number,
    page,
    paragraph,
    points,
    size_of,
    table,
    tiles,
    write_page,
)
from mtmedformer.plots.style import STYLE

HOSTILE = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> $\\frac{$ & 'quoted'"
VOID = {"meta", "img", "br", "hr", "input", "link", "col"}


class Reader(HTMLParser):
    """Follows open elements, and collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(tag)

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def plot(title: str = "a plot") -> Figure:
    with mpl.rc_context(STYLE):
        drawing = Figure(figsize=(4, 2), layout="constrained")
        axes = drawing.add_subplot()
        axes.plot([0, 1, 2], [1, 3, 2], label=title, clip_on=True)
        axes.fill_between([0, 1], [0, 1])
        axes.set_title(title)
        axes.legend()
    return drawing


def whole_page(name: str = "north") -> str:
    image = Figure(figsize=(1, 1))
    image.add_subplot().imshow(np.zeros((4, 4)))
    body = join(
        name,
        paragraph(name, "warn"),
        points([name, name]),
        facts({name: name, "count": 3}),
        tiles([(name, name)]),
        table(
            [[name, name, 1.0], [name, ShadedCell(name, 0.5), ShadedCell(2, 2.0)]], [name, name, "value"], caption=name
        ),
        figure(plot(name), name, name),
        figure(plot(name + " again"), name, name),
        figure(image, name, name, raster=True),
        code(name),
        details(name, paragraph(name)),
    )
    return page(
        name, name, [(name, body), ("Empty", Html("")), (name, body), (name, paragraph("x"))], tiles([("1", name)])
    )


def test_page_is_well_formed():
    reader = read(whole_page())
    assert reader.mistakes == []
    assert reader.open == []
    assert reader.tags.count("html") == reader.tags.count("body") == reader.tags.count("h1") == 1
    assert "Research use only" in reader.text
    assert "Empty" not in reader.text


def test_names_with_markup_are_escaped():
    reader = read(whole_page(HOSTILE))
    assert reader.mistakes == []
    assert "script" not in reader.tags
    assert not [a for a in reader.attributes if a[1].startswith("on")]
    assert [v for t, n, v in reader.attributes if t == "img" and n == "alt"] == [HOSTILE] * 2
    assert HOSTILE in reader.text


def test_page_loads_nothing_from_outside():
    text = whole_page()
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    addresses = [v for _, n, v in read(text).attributes if n in {"src", "href", "xlink:href"} and v]
    assert addresses
    assert all(v.startswith(("#", "data:image/png;base64,")) for v in addresses)


def test_ids_are_unique_and_references_resolve():
    first, second = figure(plot("one"), "", "one"), figure(plot("two"), "", "two")
    text = page("t", "s", [("a", first), ("b", second), ("c", paragraph("x"))])
    ids = [v for _, n, v in read(text).attributes if n == "id"]
    assert len(ids) == len(set(ids)) > 6
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert references
    assert set(references) <= set(ids)


def test_plots_use_the_text_colour_of_the_page_and_are_reproducible():
    drawn = figure(plot(), "below", "what it shows")
    assert "currentColor" in drawn
    assert 'aria-label="what it shows"' in drawn
    assert ">a plot</text>" in drawn
    assert drawn == figure(plot(), "below", "what it shows")


def test_table_aligns_numbers_right_and_shows_dashes_for_missing_values():
    text = table([["a", 1.23456, None], ["b", float("nan"), 12345]], ["site", "score", "images"])
    assert '<td class="n">1.235</td>' in text
    assert text.count("–") == 2
    assert "12\u202f345" in text
    assert '<th scope="row">a</th>' in text
    assert table([], ["site"]) == ""


@pytest.mark.parametrize(
    "count, words", [(12, "12 bytes"), (1500, "1.5 kB"), (123_456, "123 kB"), (2.5e6, "2.5 MB"), (3e12, "3000 GB")]
)
def test_sizes(count, words):
    assert size_of(count) == words


def test_numbers():
    assert number(None) == number(float("nan")) == "–"
    assert number(-0.5, 1) == "\u22120.5"


def test_page_is_written_atomically(tmp_path):
    write_page(tmp_path / "new" / "report.html", "é")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["report.html"]
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == "é"


def test_example_in_the_docs_makes_a_page(tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "reports.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    reader = read((tmp_path / "mine.html").read_text())
    assert reader.mistakes == []
    assert "0.910" in reader.text
