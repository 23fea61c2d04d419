"""Reads an HTML page strictly: every tag is closed, in order; what it holds can be asked for."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A parsed page; raises AssertionError where tags do not balance.

    Args:
        source: the whole page.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        """By id, then by row heading: the cells' texts."""
        self.text = ""
        self._open: list[str] = []
        self._table: dict[str, list[str]] = {}
        self._row: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables[dict(attrs).get("id") or f"table {len(self.tables)}"] = {}
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._row.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag
        if tag == "tr":
            self._table[self._row[0]] = self._row[1:]

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self._row[-1] += data

    def loads(self) -> list[str]:
        """Returns every address that a browser would fetch or follow, but places in the page."""
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        values = [attrs[name] or "" for _, attrs in self.tags for name in names if name in attrs]
        return [value for value in values if not value.startswith("#")]

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]
