"""HTML page toolkit of all reports: one file with embedded style and pictures, without scripts or network access.

Text that is not ``Html`` is escaped, so names of sites and classes may contain any character.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from mtmedformer.plots.style import INK, STYLE
from mtmedformer.storage.atomic_write import atomic_write

CSS = """
:root { color-scheme: light dark; --ink: #20242a; --soft: #5d6671; --paper: #ffffff; --line: #dfe3e8; --wash: #f5f7f9;
  --accent: #3f7fbf; --warn: #b4472e; --good: #2f7d53; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #9ba4af; --paper: #16191d; --line: #33393f;
  --wash: #1e2227; --accent: #6aa5dd; --warn: #ef8d75; --good: #79c79b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
.use { display: inline-block; font-size: .8rem; letter-spacing: .04em; color: var(--warn);
  border: 1px solid currentColor; border-radius: 1rem; padding: .05rem .7rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .7rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul, ol, dl { max-width: 44rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.subtitle, .note, figcaption, caption, footer { color: var(--soft); }
.note, figcaption, caption { font-size: .875rem; }
.warn { color: var(--warn); } .good { color: var(--good); }
nav { margin: 1rem 0 0; font-size: .9rem; } nav a { margin-right: 1.1rem; white-space: nowrap; display: inline-block; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; caption-side: top; white-space: nowrap; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th, thead td { font-weight: 600; border-bottom-color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
td.n, th.n { text-align: right; white-space: nowrap; padding-left: .6rem; }
td.s { padding-right: .6rem;
  background: color-mix(in srgb, var(--accent) calc(var(--s) * 45%), transparent);
  border-left: 2px solid var(--paper); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--wash); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile span { display: block; font-size: .84rem; color: var(--soft); }
figure { margin: 1rem 0 1.4rem; overflow-x: auto; } figcaption { max-width: 44rem; margin-top: .3rem; }
figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif
  !important; }
figure img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
pre { background: var(--wash); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem;
  line-height: 1.45; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
footer { font-size: .82rem; padding-top: 2rem; padding-bottom: 2.5rem; }
@media (max-width: 40rem) { figure svg { max-width: none; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; } h1 { font-size: 1.4rem; } }
@media print { figure { overflow: visible; } nav { display: none; }
  header, main, footer { max-width: none; } body { font-size: 11pt; }
  figure, tr, .tile { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; }
  pre { white-space: pre-wrap; } }
"""

QUANTITY = re.compile(r"[\u2212-]?[\d.\u202f]+ ?(%|s|min|h|bytes|kB|MB|GB)?")
"""Text that is right-aligned in a table, like numbers."""


class Html(str):
    """Markup made by this module; any other text is escaped."""


class ShadedCell(NamedTuple):
    """A table cell with a shaded background.

    Attributes:
        value: Text or number.
        shade: Strength of the shade, 0 (none) to 1.
    """

    value: Any
    shade: float = 0.0


def page(title: str, subtitle: str, sections: Sequence[tuple[str, Html]], summary: Html | None = None) -> str:
    """Lay sections out as one HTML page.

    Args:
        title: Title of the page.
        subtitle: One line below the title.
        sections: Heading and content of each section; sections without content are left out.
        summary: Content above all sections.

    Returns:
        The whole file.
    """
    shown = [(heading, f"s{i}", body) for i, (heading, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for heading, key, _ in shown)
    bodies = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>' for heading, key, body in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>\n"
        f'<header><span class="use">Research use only</span><h1>{escape(title)}</h1>'
        f'<p class="subtitle">{escape(subtitle)}</p>{summary or ""}'
        f"{f'<nav>{links}</nav>' if len(shown) > 2 else ''}</header>\n"
        f"<main>{bodies}</main>\n"
        "<footer>Written by MTMedFormer. Research use only: not a medical device, not for diagnosis.</footer>\n"
        "</body></html>\n"
    )


def write_page(file: Path, text: str) -> None:
    """Write a page atomically."""
    with atomic_write(file) as part:
        part.write_text(text, encoding="utf-8")


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str], caption: str = "", digits: int = 3) -> Html:
    """Lay rows out as a table that scrolls where it is wider than the page.

    Args:
        rows: Cells of each row; the first cell is the row header. Numbers are right-aligned, ``None`` and NaN become a
            dash.
        columns: Heading of each column.
        caption: A line above the table.
        digits: Digits after the decimal point of a ``float``.
    """
    filled = [list(row) for row in rows]
    if not filled:
        return Html("")
    plain = [[cell.value if isinstance(cell, ShadedCell) else cell for cell in row] for row in filled]
    numeric = [any(_looks_like_number(row[i]) for row in plain if i < len(row)) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_n(i > 0 and numeric[i])}>{escape(c)}</th>' if c else "<td></td>"
        for i, c in enumerate(columns)
    )
    lines = []
    for row in filled:
        cells = [f'<th scope="row">{_text(row[0], digits)}</th>']
        cells += [_cell(cell, numeric[i], digits) for i, cell in enumerate(row[1:], start=1)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="wide"><table>{above}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def figure(drawing: Figure, caption: str, alt: str, raster: bool = False, dpi: int = 110) -> Html:
    """Embed a matplotlib figure: as SVG, which takes the text colour of the page, or as PNG.

    Args:
        drawing: The figure; the colour ``INK`` in it follows the light or dark theme of the reader.
        caption: A line below the figure.
        alt: Alternative text for readers who cannot see the figure.
        raster: Embed a PNG, for medical images and for plots of many thousand points.
        dpi: Resolution of the PNG.
    """
    buffer = io.BytesIO()
    if raster:
        drawing.savefig(buffer, format="png", dpi=dpi)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    else:
        with mpl.rc_context(STYLE):
            drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        picture = _inline_svg(buffer.getvalue().decode(), alt)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{picture}{below}</figure>")


def _inline_svg(svg: str, alt: str) -> str:
    """Return the SVG element without addresses, in the text colour of the page, with ids unique on the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=").replace(INK, "currentColor")
    mark = f"f{hashlib.blake2b(svg.encode(), digest_size=5).hexdigest()}-"
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{mark}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def join(*parts: str) -> Html:
    """Join parts vertically; plain text becomes a paragraph."""
    return Html("".join(part if isinstance(part, Html) else paragraph(part) for part in parts if part))


def paragraph(text: str, kind: str = "") -> Html:
    """Return text as a paragraph.

    Args:
        text: The text; escaped unless it is ``Html``.
        kind: ``note`` (small), ``warn`` or ``good`` (coloured), or nothing.
    """
    return Html(f"<p{f' class={escape(kind)!r}' if kind else ''}>{escape(text)}</p>")


def heading(text: str) -> Html:
    """Return a heading one level below that of the section."""
    return Html(f"<h3>{escape(text)}</h3>")


def points(lines: Iterable[str]) -> Html:
    """Return a bullet list; empty without lines."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Html(f"<ul>{items}</ul>" if items else "")


def facts(pairs: Mapping[str, Any]) -> Html:
    """Return names and values as two columns."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items())
    return Html(f"<dl>{rows}</dl>" if rows else "")


def tiles(pairs: Sequence[tuple[str, str]]) -> Html:
    """Return tiles of large values, each with its label below it."""
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in pairs
    )
    return Html(f'<div class="tiles">{boxes}</div>' if boxes else "")


def code(text: str) -> Html:
    """Return preformatted text in a fixed-width font."""
    return Html(f"<pre>{escape(text)}</pre>")


def details(summary: str, body: Html) -> Html:
    """Return content that is folded under a summary line."""
    return Html(f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else "")


def number(value: float | None, digits: int = 3) -> str:
    """Format a number: a dash for ``None`` and NaN, thin spaces between thousands."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,d}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return text.replace(",", "\u202f").replace("-", "\u2212")


def size_of(count: float) -> str:
    """Format a number of bytes, for example ``1.4 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Format seconds, for example ``2.5 min``."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def escape(value: Any) -> str:
    """Escape text for HTML; ``Html`` is returned unchanged."""
    return value if isinstance(value, Html) else html.escape(str(value))


def _text(value: Any, digits: int = 3) -> str:
    if value is None:
        return "–"
    return number(value, digits) if _is_number(value) else escape(value)


def _cell(cell: Any, numeric: bool, digits: int) -> str:
    value, shade = (cell.value, cell.shade) if isinstance(cell, ShadedCell) else (cell, 0.0)
    classes = " ".join(name for name, there in (("n", numeric), ("s", isinstance(cell, ShadedCell))) if there)
    marks = f' class="{classes}"' if classes else ""
    style = f' style="--s:{min(max(shade, 0.0), 1.0):.2f}"' if isinstance(cell, ShadedCell) else ""
    return f"<td{marks}{style}>{_text(value, digits)}</td>"


def _n(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _looks_like_number(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, str) and bool(QUANTITY.fullmatch(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
