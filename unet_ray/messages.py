"""Numbers and names as messages have them."""

from __future__ import annotations

import os
import re
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


_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What moves a terminal's cursor, ends a line, turns the direction of writing, or is no text."""


def printable(text: str) -> str:
    """Returns a text in one line, with escapes for what a terminal would obey: the names of files may hold anything."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def say(*lines: str) -> None:
    """Prints lines for the user at once, also when the output is a file or a job's log."""
    print("\n".join(map(printable, lines)), flush=True)


def amounts(resources: Mapping[str, float]) -> str:
    """`2 CPUs, 1 GPU`."""
    return ", ".join(f"{value:g} {key}{'s' * (value != 1)}" for key, value in resources.items())


_NO_REASON = re.compile(
    r"Graph execution error:|Detected at node |<stack traces|File \"|\[\[|\[Op:|Hint: |Original stack trace|"
    r"\d+ (root error|successful operation|derived error)"
)
"""Beginnings of lines that TensorFlow puts before and after the one that says what went wrong."""


def reason_of(error: BaseException) -> str:
    """The line of an error's text that says what went wrong: of a traceback the last, of TensorFlow's text its own.

    >>> reason_of(ValueError("Graph execution error:\\n\\nOOM when allocating tensor\\n\\t [[{{node zeros}}]]"))
    'OOM when allocating tensor'
    """
    lines = (
        re.sub(r"\{\{function_node .*?\}\} |^\(\d+\) | \[Op:\S*\].*$", "", line.strip())
        for line in str(error).splitlines()
    )
    reasons = [line for line in lines if line and not _NO_REASON.match(line)]
    return reasons[-1] if reasons else "no reason was given"
