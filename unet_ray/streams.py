"""Standard output and standard error of a command: what cannot be written there costs a line, never the work."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from unet_ray.errors import JobFailed

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


_NOTICE = re.compile(
    rb"[IWE]\d{4} |\d{4}-\d\d-\d\d [\d:.]+: [IWE] |WARNING: All log messages before absl::InitializeLog\(\)"
)
"""Beginnings of lines that TensorFlow's C++ writes: TF_CPP_MIN_LOG_LEVEL keeps none of them back in 2.21."""
_NOTHING = re.compile(rb"(?!)")


def without_notices() -> AbstractContextManager[None]:
    """Keeps back what TensorFlow's C++ writes to standard error in the block; after a bug, all of that is written."""
    return without_lines(_NOTICE, all_after_a_bug=True)


@contextmanager
def without_lines(dropped: re.Pattern[bytes], *, all_after_a_bug: bool = False) -> Iterator[None]:
    """Keeps lines off standard error that begin with a pattern, also those of C++, written in the block.

    What others write there comes when the block has ended.
    """
    with tempfile.TemporaryFile() as held_back, _instead_of_standard_error(held_back.fileno()) as standard_error:
        try:
            yield
        except (ValueError, OSError, JobFailed):  # which have a line of their own
            raise
        except Exception:
            dropped = _NOTHING if all_after_a_bug else dropped
            raise
        finally:
            sys.stderr.flush()
            held_back.seek(0)
            os.write(standard_error, b"".join(line for line in held_back if not dropped.match(line)))


@contextmanager
def _instead_of_standard_error(number: int) -> Iterator[int]:
    """Lets a file take the place of descriptor 2 in the block, and yields one of what was there."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        os.dup2(number, 2)
        yield before
    finally:
        os.dup2(before, 2)
        os.close(before)
