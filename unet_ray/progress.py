"""One truthful line about a running job: done of the known total, rate, time left; a bar on a terminal.

Rate and time left are those of the work itself: what comes before its first piece is done (processes start, a network
is compiled) counts in neither. What they are of stands behind them: `3 min 05 s left for all frames`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Self, TextIO

BAR_WIDTH = 24
LINE_EVERY_S = 30.0
"""Where nobody watches (a file, a job's log) a line comes this often; on a terminal it is redrawn twice a second."""

_RATE_OVER_S = 60.0

SETTLED_S = 5.0
"""After the first piece, before a rate is one: at a start several processes end their first pieces at once."""


class Progress:
    """Counts what is done and prints it now and then; while the block runs also where nothing is done for long."""

    def __init__(self, total: int, unit: str, *, done: int = 0, stream: TextIO | None = None) -> None:
        """Starts the clock.

        Args:
            total: all there is to do.
            unit: what is counted, in the plural: `frames`.
            done: what an earlier run has done; it counts as done, not in the rate.
            stream: where to write; standard output by default.
        """
        self._stream = stream or sys.stdout
        self._total, self._unit, self.done = total, unit, done
        self._is_terminal = self._stream.isatty()
        self._every_s = 0.5 if self._is_terminal else LINE_EVERY_S
        self._start = time.monotonic(), done
        self._marks: deque[tuple[float, int]] = deque()
        self._next_print_s = self._start[0] + self._every_s
        self._note = ""
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._repeat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _repeat(self) -> None:
        while not self._over.wait(self._every_s):
            self.tick()

    def advance(self, count: int, note: str = "") -> None:
        """Counts `count` more as done and prints when it is time to."""
        with self._lock:
            self.done, self._note = self.done + count, note
            now_s = time.monotonic()
            self._marks.append((now_s, self.done))
            while len(self._marks) > 2 and self._marks[1][0] < now_s - _RATE_OVER_S:
                self._marks.popleft()
        self.tick()

    def tick(self) -> None:
        """Prints when it is time to."""
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._next_print_s:
                self._next_print_s = now_s + self._every_s
                self._print(self._note, self._rate())

    def _print(self, note: str, rate: float | None) -> None:
        share = self.done / self._total if self._total else 1.0
        line = f"{self.done:,} of {self._total:,} {self._unit} ({share:.0%})"
        if rate is not None:
            line += f", {rate:,.1f} {self._unit}/s"
        if rate and self.done < self._total:
            line += f", {time_left((self._total - self.done) / rate, self._unit)}"
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{bar(share)} {line}{note}")
        else:
            self._stream.write(f"{line}{note}\n")
        self._stream.flush()

    def _rate(self) -> float | None:
        """Pieces a second since the first one, or over the last minute; None while that is not known."""
        if len(self._marks) < 2:
            return None
        since_s, before = self._marks[0]
        seconds = time.monotonic() - since_s
        return (self.done - before) / seconds if seconds >= SETTLED_S else None

    def finish(self, note: str = "") -> None:
        """Prints the last state, whatever the time."""
        self._over.set()
        with self._lock:
            since_s, before = self._start
            whole = (self.done - before) / max(1e-9, time.monotonic() - since_s)
            self._print(note, self._rate() or whole)
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()


def time_left(seconds: float, unit: str) -> str:
    """`3 min 05 s left for all frames`."""
    return f"{duration(seconds)} left for all {unit}"


def bar(share: float) -> str:
    """Returns a bar of which `share` is filled."""
    filled = round(share * BAR_WIDTH)
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
