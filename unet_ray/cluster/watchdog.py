"""Ends a process that lives and gets nowhere, where nothing else would notice."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from unet_ray import PACKAGE


class Watchdog:
    """Watches over a block of work that beats after every piece of it, or is done in time.

    Ray and TensorFlow notice a process that died or was stopped. One that waits for ever, for a file, a lock or another
    worker, has only this.
    """

    def __init__(self, timeout_s: float, on_stuck: Callable[[str], None], *, exit_code: int = 1):
        """Takes the seconds without a beat after which it ends the process with an exit code.

        `on_stuck` is called before that, with the place in the watched thread: `training/steps.py:62 (start_strategy)`.
        """
        self._timeout_s, self._on_stuck, self._exit_code = timeout_s, on_stuck, exit_code
        self._beaten_at = 0.0
        self._over = threading.Event()

    def beat(self) -> None:
        """Says that the work goes on."""
        self._beaten_at = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the block runs."""
        self.beat()
        threading.Thread(target=self._watch, args=[threading.get_ident()], daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self, thread: int) -> None:
        while not self._over.wait(self._left_s()):
            if self._left_s() <= 0:
                try:
                    self._on_stuck(_position(thread))
                finally:
                    os._exit(self._exit_code)  # what is stuck runs no handler and sees no exception

    def _left_s(self) -> float:
        return max(0.0, self._beaten_at + self._timeout_s - time.monotonic())


def _position(thread: int) -> str:
    """Where a thread is in this package's code, and what that has called, if something else."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    last = max((index for index, frame in enumerate(stack) if _is_ours(frame)), default=-1)
    return " -> ".join(f"{_file(frame)}:{frame.lineno} ({frame.name})" for frame in stack[last:][:2])


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(PACKAGE)


def _file(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return str(path.relative_to(PACKAGE)) if _is_ours(frame) else path.name
