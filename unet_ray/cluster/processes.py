"""Processes of this machine: those that one has started, found in /proc (Linux), and what memory they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

KEEP_MEMORY: Mapping[str, str] = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
"""Environment of processes that take frame after frame: glibc (mallopt(3)) keeps freed memory for the next frame.

Else it goes back to the kernel, which clears every page that it hands out: of the 4 to 5 ms of a core for a 480x640 PNG
0.5 went to that, now 0.2; counting a mask of that size took 3.6, now 1.4 (glibc 2.36, AVX-512, 2026-11-29).
"""


def descendants(pid: int) -> set[int]:
    """Returns the ids of all processes that a process has started, directly or not."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    processes: set[int] = set()
    new = [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        processes |= set(new)
    return processes
