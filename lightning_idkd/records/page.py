"""The HTML page of a report: its frame with style and script inside, and the tables and figures that it consists of."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_idkd.records.markup import Html, element, join

FOLDER = Path(__file__).parent
TALL = 40
"""Rows from which on a table scrolls in a frame of its own height."""
LONGEST = 60_000
"""Characters of a text, such as a config, that a page shows; the rest is left out."""


class Section(NamedTuple):
    """A part of a page with a heading, which the list of contents links to."""

    name: str
    title: str
    content: Html


class Column(NamedTuple):
    """A column of a table."""

    title: str
    form: str | None = None
    """Format of its numbers, such as ``.1%``; None for texts."""
    style: str | None = None
    """Class of its cells in the style sheet: ``short`` texts stay on a line, a ``path`` may break anywhere."""


class Sorted(NamedTuple):
    """A cell that is sorted by another value than its text."""

    text: object
    value: object


def build_page(title: str, subtitle: object, lead: object, sections: Sequence[Section], footer: str) -> str:
    """Build the page.

    It is one file without links to others, and the browser loads nothing and runs no script but the one that sorts
    tables: the page forbids it.
    """
    style = FOLDER.joinpath("report.css").read_text(encoding="utf-8")
    script = FOLDER.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    links = [element("li", element("a", s.title, href=f"#{s.name}")) for s in sections]
    contents = element("nav", element("ul", links), aria_label="Contents")
    parts = [element("section", element("h2", s.title, id=s.name), s.content) for s in sections]
    header = element(
        "header", element("h1", title), element("p", subtitle, class_="muted"), element("p", lead), contents
    )
    body = element("body", header, element("main", parts), element("footer", footer), element("script", Html(script)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def build_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], label: str, sortable: bool = False) -> Html:
    """Build a table whose first column names the rows, in a frame that scrolls if the table is too large.

    Args:
        rows: a value for each column; None and nan are shown as a dash.
        label: what the table shows, for those who do not see it.
        sortable: whether a click on a heading sorts it.
    """
    headings = []
    for column in columns:
        title = element("button", column.title, type="button") if sortable else column.title
        headings.append(element("th", title, scope="col", class_="number" if column.form else None))
    lines = []
    for row in rows:
        cells = []
        for i, (value, column) in enumerate(zip(row, columns, strict=True)):
            text, plain = format_cell(value, column)
            attributes: dict[str, Any] = {"class_": "number" if column.form else column.style}
            if sortable and plain != text:
                attributes["data_value"] = plain
            cells.append(element("td" if i else "th", text, **attributes, **({} if i else {"scope": "row"})))
        lines.append(element("tr", cells))
    table = element(
        "table",
        element("thead", element("tr", headings)),
        element("tbody", lines),
        class_="sortable" if sortable else None,
    )
    return scroll(table, label, tall=len(rows) > TALL)


def drop_empty(columns: Sequence[Column], rows: Sequence[list]) -> tuple[list[Column], list[list]]:
    """Leave out the columns that have no value in any row."""
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def format_cell(value: Any, column: Column) -> tuple[object, str]:
    """What a cell shows, and the plain value by which it is sorted."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–", ""
    if isinstance(value, Sorted):
        return value.text, str(value.value)
    if column.form and not isinstance(value, str):
        return format(value, column.form), repr(value)
    return value, str(value)


def build_facts(rows: Sequence[tuple[str, object]], label: str) -> Html:
    """Build a table of names and values."""
    lines = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    return scroll(element("table", element("tbody", lines), class_="facts"), label)


def scroll(content: Html, label: str, tall: bool = False) -> Html:
    """A frame that scrolls by itself, also by the keyboard, so that the page does not become wider than the screen; a
    ``tall`` one is not higher than the screen either."""
    style = "scroll tall" if tall else "scroll"
    return element("div", content, class_=style, tabindex=0, role="region", aria_label=label)


def build_tiles(tiles: Sequence[tuple[str, object, object]]) -> Html:
    """Build the row of the most important numbers: name, number, and a remark."""
    parts = [element("div", element("dt", a), element("dd", b), element("dd", c)) for a, b, c in tiles]
    return element("dl", parts, class_="tiles")


def figure(title: str | None, *content: object, caption: object = None) -> Html:
    """A figure with a heading and a caption."""
    heading = None if title is None else element("h3", title)
    text = None if caption is None else element("figcaption", caption)
    return element("figure", heading, content, text)


def fold(title: str, *content: object) -> Html:
    """A part of the page that opens on a click."""
    return element("details", element("summary", title), content)


def code(text: str, label: str) -> Html:
    """A block of code; a very long one is cut, which its last line says."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n... ({len(text) - LONGEST:,} more characters are in the file)"
    return element("pre", element("code", text), tabindex=0, role="region", aria_label=label)


def allow_breaks(path: object) -> Html:
    """A path that may be broken behind its slashes, commas and underscores."""
    return join([(part, element("wbr")) for part in re.split(r"(?<=[/,_])", str(path))])


def paragraph(*content: object, muted: bool = False) -> Html:
    """A paragraph."""
    return element("p", join(*content), class_="muted" if muted else None)
