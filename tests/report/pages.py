"""Reading a page back: its tables as text, its tags, its scripts."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tables by the name of their region, as rows of texts; every tag with its attributes; texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._region = ""
        self._cell: list[str] | None = None
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if found.get("role") == "region":
            self._region = str(found["aria-label"])
            self.tables[self._region] = []
        elif tag == "tr":
            self.tables[self._region].append([])
        elif tag in ("td", "th"):
            self._cell = []
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = False
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._region][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
            return
        self.text += data
        if self._cell is not None:
            self._cell.append(data + " ")
