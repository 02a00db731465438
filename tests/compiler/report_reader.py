"""Reads a report as a browser would: its numbers with what they are marked as, its tables with their heads, its elements with what names them."""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

NUMBER = re.compile(r"(?<![\w.:])[+\u2212-]?\d+(?:\.\d+)?(?![\w]*[:_])")  # not the 2 of decoder:2, nor the 16 of fp16
VOID = {"meta", "br", "hr", "input", "img", "link", "rect", "path", "circle", "line", "use", "polyline", "image"}
NAMES = {"grid", "name"}  # classes of what is no number of the result: axes and their ticks, names of plans and budgets


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())


@dataclass
class Made:
    """One table: its caption, its heads as (title with what is below), and its body rows as cells of (text, kind)."""
    id: str
    caption: str = ""
    heads: list[str] = field(default_factory=list)
    rows: list[list[tuple[str, str]]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # of each row


class Reader(HTMLParser):
    """numbers: (text, kinds of all elements around it, the innermost table's id or '') of table cells, charts, bars and tiles, in order."""

    def __init__(self, html: str):
        super().__init__()
        self.path: list[Element] = []
        self.elements: list[Element] = []
        self.numbers: list[tuple[str, list[str], str]] = []
        self.tables: dict[str, Made] = {}
        self.group = ""
        self.feed(html)
        self.close()
        assert not self.path, f"not closed: {self.path}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.elements.append(element)
        if tag not in VOID:
            self.path.append(element)
        if tag == "table":
            self.tables[element.attributes["id"]] = Made(element.attributes["id"])
            self.group = ""
        if tag in ("th", "td") and self.table:
            if "thead" in self.tags:
                self.table.heads.append("")
            elif element.attributes.get("scope") == "rowgroup":
                self.group = ""
            else:
                if element.attributes.get("scope") == "row":
                    self.table.rows.append([])
                    self.table.groups.append(self.group)
                self.table.rows[-1].append(("", element.attributes.get("data-kind", "")))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.path.pop().tag == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.path.pop()

    @property
    def tags(self) -> list[str]:
        return [element.tag for element in self.path]

    @property
    def table(self) -> Made | None:
        found = [element for element in self.path if element.tag == "table"]
        return self.tables[found[0].attributes["id"]] if found else None

    def handle_data(self, data: str) -> None:
        if self.table and "caption" in self.tags:
            self.table.caption += data
        cell = next((element for element in reversed(self.path) if element.tag in ("td", "th")), None)
        if self.table and cell:
            space = " " if "small" in self.tags else ""
            if "thead" in self.tags:
                self.table.heads[-1] += space + data
            elif cell.attributes.get("scope") == "rowgroup":
                self.group += data
            else:
                text, kind = self.table.rows[-1][-1]
                self.table.rows[-1][-1] = (text + space + data, kind)
        if self.holds_numbers():
            kinds = [element.attributes["data-kind"] for element in self.path if "data-kind" in element.attributes]
            self.numbers += [(found, kinds, self.table.id if self.table else "") for found in NUMBER.findall(data)]

    def holds_numbers(self) -> bool:
        """Whether here is a table's cell, or the text of a chart, a bar or a tile, and not a name or an axis."""
        if any(element.classes & NAMES or element.tag in ("th", "style", "script") for element in self.path):
            return False
        places = {"td", "text", "dd" if any("tiles" in element.classes for element in self.path) else "td"}
        return any(element.tag in places or "n" in element.classes or "data-kind" in element.attributes for element in self.path)


def of_markdown(text: str) -> dict[str, list[str]]:
    """Of every table of a Markdown text its numbers by the kind that its column's heading ends with."""
    found: dict[str, list[str]] = {}
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if re.fullmatch(r"\|( -+:? \|)+", line):
            kinds = [match[1] if (match := re.search(r"\((\w+)\) *$", head)) else "" for head in _cells(lines[at - 1])]
            for row in lines[at + 1:]:
                if not row.startswith("|"):
                    break
                for kind, cell in zip(kinds, _cells(row)):
                    found.setdefault(kind, []).extend(NUMBER.findall(re.sub(r"\bat \d+", "", cell.replace("**", ""))))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
