"""Standard output and standard error of a command: what cannot be written there costs a line, never the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

# A library's file would else get one of these numbers, and whoever prints would write into it.
_NUMBERS = (0, 1, 2)


class _Steady(io.FileIO):
    """A descriptor to which writing goes on after it has failed, into nothing."""

    trouble: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        if self.trouble is None:
            try:
                return super().write(data)
            except OSError as error:
                self.trouble = error
        return memoryview(data).nbytes


_STEADY: dict[str, _Steady] = {}


def steady() -> None:
    """From now on a closed or full standard output or error ends nothing, and letters that it lacks are escaped."""
    for number in _NUMBERS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout, sys.stderr = _steadied("stdout", 1, sys.stdout), _steadied("stderr", 2, sys.stderr)


def _steadied(name: str, number: int, stream: TextIO | None) -> TextIO:
    _STEADY[name] = _Steady(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(_STEADY[name]),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False) or name == "stderr",
    )


def flush() -> OSError | None:
    """Writes what is left; returns why standard output is not whole, or None. A reader that has left is no reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    trouble = _STEADY["stdout"].trouble if "stdout" in _STEADY else None
    return None if trouble is None or trouble.errno == errno.EPIPE else trouble
