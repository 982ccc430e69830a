"""Builds HTML and SVG from elements that escape every text, and escapes text for Markdown."""

from __future__ import annotations

import re
from html import escape

VOID = ("meta", "link", "img", "br", "wbr")
"""Elements without content and without an end tag."""
MARKDOWN = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)|^[#+-]", re.MULTILINE)
"""Characters that Markdown may read as something else than text."""


class Html(str):
    """Text that is markup already. Every other text is escaped where an element takes it."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Build an element.

    Args:
        children: markup, other values, which are escaped, lists of these, or None for nothing.
        attributes: ``_`` stands for ``-``, and a ``_`` at the end is dropped, as in ``class_``. None and False leave an
            attribute out; True gives it no value.
    """
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    start = f"<{name}{''.join(parts)}>"
    return Html(start if name in VOID else f"{start}{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Join the children of an element."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(escape(str(child), quote=False))
    return Html("".join(parts))


def escape_markdown(text: object) -> str:
    """Escape a text for a line or a table cell of Markdown; line breaks become spaces."""
    return MARKDOWN.sub(lambda match: f"\\{match[0]}", " ".join(str(text).split()))


def fence(text: str, language: str) -> str:
    """A block of code in Markdown, whose fence is longer than any row of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}\n"
