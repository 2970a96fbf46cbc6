"""A reader of the report pages, for the tests of both."""

from __future__ import annotations

import html.parser
import json
from typing import Any


class Page(html.parser.HTMLParser):
    """Collects what a test asks about: text outside of scripts, marked figures, links, headings of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text, self._open, self._hidden = "", [], False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._hidden = tag in ("script", "style")
        self.links += [v for k in ("src", "href", "action", "data", "poster", "srcset") if (v := values.get(k))]
        if "id" in values:
            assert values["id"] not in self.ids, f"id {values['id']} twice"
            self.ids.add(values["id"] or "")
        if "data-ref" in values:
            self._open = [values["data-ref"], values["data-format"], ""]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag == "span" and self._open:
            self.figures.append(tuple(self._open))
            self._open = []

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self.text += data
        if self._open:
            self._open[2] += data


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)
