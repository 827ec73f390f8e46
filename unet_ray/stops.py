"""Signals that tell this process to stop, also those that its main thread has not met yet, as it waits in C++.

Python runs a handler when the main thread comes back from C++, and only then. A thread that has to know before asks
here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

STOPPED = "{}; the same command goes on where this one stopped"
WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped"}

_arrivals: int | None = None
"""Where Python writes the number of each signal, as it comes."""
_last_word = threading.Lock()


def note_arrivals() -> None:
    """Makes `arrived` know of signals that come from now on; for the main thread."""
    global _arrivals, _last_word
    _last_word = threading.Lock()
    if _arrivals is None:
        _arrivals, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)


def arrived() -> int | None:
    """Returns a signal that told this process to stop since it was last asked, or that waits for it to run."""
    numbers = set(_waiting())
    if _arrivals is not None:
        with contextlib.suppress(BlockingIOError):
            numbers.update(os.read(_arrivals, 4096))
    return next((int(number) for number in WORDS if number in numbers), None)


def takes_last_word() -> bool:
    """Whether nobody has said yet why this process ends: a handler and another thread may be about to at once."""
    return _last_word.acquire(blocking=False)


def _waiting() -> list[int]:
    """Signals for this process that no thread of it has taken yet; proc(5)."""
    status = Path("/proc/self/status").read_text()
    mask = int(status.partition("ShdPnd:")[2].split()[0], 16)
    return [number for number in WORDS if mask >> (number - 1) & 1]
