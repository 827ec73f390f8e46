"""JSON arrays that memory need not hold at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def json_items(items: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Yields the items of a JSON array, one a line."""
    separator = b""
    for item in items:
        yield separator + json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
        separator = b",\n"
