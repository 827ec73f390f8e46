"""Numbers and names as messages have them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def count(number: int, noun: str) -> str:
    """`1 frame`, `2,400 frames`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """`a, b, c and 12 more`."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shown_path(uri: str) -> str:
    """`drives/a` for a path below the current folder, as a person gave it; any other URI as it is."""
    current = os.path.join(os.getcwd(), "")
    return uri.removeprefix(current) or uri


def say(line: str) -> None:
    """Prints one line for the user at once, also when the output is a file or a job's log."""
    print(line, flush=True)


def amounts(resources: Mapping[str, float]) -> str:
    """`2 CPUs, 1 GPU`."""
    return ", ".join(f"{value:g} {key}{'s' * (value != 1)}" for key, value in resources.items())
