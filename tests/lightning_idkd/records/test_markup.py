"""Texts in HTML and in Markdown stay texts."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from lightning_idkd.records.markup import Html, element, escape_markdown, fence, join

HOSTILE = ("<script>alert(1)</script>", '" onload="alert(1)', "a | b", "`code`", "*stars*", "_x_ snake_case", "# head",
           "[a](http://b)", "back\\slash", "&amp; &", "~~gone~~", "- item", "1. one", "two\n\nparagraphs")  # fmt: skip


class Texts(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_an_element_shows_any_text_and_any_attribute_as_it_is(text):
    read = Texts(element("p", text, title=text))
    assert read.elements == [("p", {"title": text})]
    assert read.text == text


def test_children_may_be_markup_lists_numbers_and_none():
    made = element("p", "a<", [element("b", 1), None], Html("<i>x</i>"), class_="k", hidden=True, id=None, data_value=2)
    assert made == '<p class="k" hidden data-value="2">a&lt;<b>1</b><i>x</i></p>'
    assert element("br") == "<br>"
    assert join() == ""


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_any_text_in_a_cell_and_in_a_heading(text):
    escaped = escape_markdown(text)
    page = (
        MarkdownIt("commonmark").enable("table").render(f"# {escaped}\n\n| {escaped} | b |\n| --- | --- |\n| 1 | 2 |\n")
    )
    read = Texts(page)
    shown = " ".join(text.split())
    assert [tag for tag, _ in read.elements] == ["h1", "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert [line for line in read.text.splitlines() if line][:2] == [shown, shown]


@pytest.mark.parametrize("text", ["a: 1", "a: |\n  ```\n  # no heading\n", "x````y"])
def test_a_block_of_code_ends_where_its_text_ends(text):
    tokens = MarkdownIt().parse(fence(text, "yaml") + "\nafter\n")
    assert [t.content for t in tokens if t.type == "fence"] == [text.rstrip() + "\n"]
    assert [t.content for t in tokens if t.type == "inline"] == ["after"]
