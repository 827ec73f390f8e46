"""Ends a process that lives and gets nowhere, where nothing else would notice."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Watches over a block of work that beats after every piece of it, or is done in time.

    Ray and TensorFlow notice a process that died or was stopped. One that waits for ever, for a file, a lock or another
    worker, has only this.
    """

    def __init__(self, timeout_s: float, on_stuck: Callable[[], None]):
        """Takes the seconds without a beat after which it calls `on_stuck` and ends the process with exit code 1."""
        self._timeout_s, self._on_stuck = timeout_s, on_stuck
        self._beaten_at = 0.0
        self._over = threading.Event()

    def beat(self) -> None:
        """Says that the work goes on."""
        self._beaten_at = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the block runs."""
        self.beat()
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._left_s()):
            if self._left_s() <= 0:
                try:
                    self._on_stuck()
                finally:
                    os._exit(1)  # what is stuck runs no handler and sees no exception

    def _left_s(self) -> float:
        return max(0.0, self._beaten_at + self._timeout_s - time.monotonic())
