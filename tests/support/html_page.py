"""A page of HTML as a test reads it: its text, its pictures, its commands and queries, and what must not be in it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

_VOID = {"meta", "img", "br", "link", "input", "hr"}
_FORBIDDEN = {"script", "iframe", "object", "embed", "form", "link", "base"}


class HtmlPage(HTMLParser):
    """Raises AssertionError where tags are not closed, something may run, or something outside is asked for."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text("utf-8")
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: dict[str, np.ndarray] = {}
        """By their alternative text."""
        self.blocks: dict[str, list[str]] = {"sql": [], "shell": []}
        self._block: list[str] | None = None
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in _FORBIDDEN, tag
        assert not [name for name in given if name.startswith("on")], given
        assert (given.get("href") or "#").startswith("#") and (given.get("src") or "data:").startswith("data:")
        assert (given.get("xlink:href") or "#").startswith("#")
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "img":
            data = base64.b64decode((given["src"] or "").partition(",")[2])
            self.images[given["alt"] or ""] = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
        if tag == "pre":
            self._block = []
        if tag == "span" and self._block:
            self._block.append("\n")
        self._kind = given.get("class", "") if tag == "pre" else getattr(self, "_kind", "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes no tag"
        if tag == "pre" and self._block is not None:
            self.blocks[self._kind or ""].append("".join(self._block))
            self._block = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
            if self._block is not None:
                self._block.append(data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return re.sub(r"\s+", " ", " ".join(self.texts))
