"""Watches a contestant of the benchmark while it runs: its commits, its memory, how busy the GPU is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unet_ray import storage
from unet_ray.bench.benchmark import late_over_early, steady_rate
from unet_ray.chaos import faults
from unet_ray.output import plans

WARM_UP_SHARE = 0.1
"""Of the frames: when so many are committed, the steady state begins (`benchmark.steady_rate`)."""

_LOOK_EVERY_S = 0.2


class Watcher:
    """Looks at something, again and again, while a process runs."""

    def __init__(self) -> None:
        self._over = threading.Event()

    @contextlib.contextmanager
    def of(self, pid: int) -> Iterator[None]:
        """Looks until the block is left."""
        looking = threading.Thread(target=self._repeat, args=(pid,), daemon=True)
        looking.start()
        try:
            yield
        finally:
            self._over.set()
            looking.join()

    def _repeat(self, pid: int) -> None:
        while True:
            self.look(pid)
            if self._over.wait(_LOOK_EVERY_S):
                return

    def look(self, pid: int) -> None:
        """Looks once."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """Returns what was seen."""
        raise NotImplementedError


@dataclass
class Commits(Watcher):
    """When which chunk was committed, by the times of the records, which are gone when all is published."""

    out: Path
    _at_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def look(self, pid: int) -> None:
        """See `Watcher`."""
        with contextlib.suppress(OSError):  # not there yet, or no longer
            for record in os.scandir(self.out / "_work" / "records"):
                if record.name not in self._at_s and not record.name.startswith(storage.TEMPORARY_PREFIX):
                    self._at_s[record.name] = record.stat().st_mtime

    def result(self) -> dict[str, Any]:
        """Returns the rate of the steady state; a chunk that was not seen came last."""
        published_s = (self.out / "summary.json").stat().st_mtime
        chunks = plans.read_plan(str(self.out)).chunks
        committed = [(self._at_s.get(f"{chunk.key}.json", published_s), chunk.n_rows) for chunk in chunks]
        rate, from_s, frames = steady_rate(committed, published_s, WARM_UP_SHARE)
        return {"steady_per_s": rate, "steady_frames": frames, "steady_from_s": from_s}


class Growth(Watcher):
    """How many chunks are committed, looked at more rarely the more there are: the folder is read each time."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self._records = out / "_work" / "records"
        self._seen: list[tuple[float, int]] = []
        self._next_s = 0.0

    def look(self, pid: int) -> None:
        """See `Watcher`."""
        began_s = time.monotonic()
        if began_s < self._next_s:
            return
        with contextlib.suppress(OSError):  # not there yet, or no longer
            number = sum(1 for _ in os.scandir(self._records))
            if not self._seen or number > self._seen[-1][1]:  # they go when all is published
                self._seen.append((began_s, number))
        self._next_s = began_s + 50 * (time.monotonic() - began_s)

    def result(self) -> dict[str, Any]:
        """Returns the rate of the second half of the chunks over that of the first."""
        return {"late_over_early": late_over_early(self._seen)}


class Memory(Watcher):
    """The most memory of its own (no shared pages: Ray's object store is one) of the process and of Ray's workers."""

    def __init__(self) -> None:
        super().__init__()
        self._driver_kb, self._worker_kb = 0, 0

    def look(self, pid: int) -> None:
        """See `Watcher`."""
        self._driver_kb = max(self._driver_kb, _own_kb(pid))
        self._worker_kb = max([self._worker_kb, *map(_own_kb, faults.titled_below(pid, "ray::"))])

    def result(self) -> dict[str, Any]:
        """Returns both in MB."""
        return {"driver_mb": self._driver_kb / 1e3, "worker_mb": self._worker_kb / 1e3}


def _own_kb(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


class Busy(Watcher):
    """How busy the GPUs are, as `nvidia-smi` tells; nothing where that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[float, float]] = []

    def look(self, pid: int) -> None:
        """See `Watcher`."""
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, ValueError):
            answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
            if answer:
                self._seen.append((time.time(), sum(map(float, answer)) / len(answer) / 100))

    def result(self) -> dict[str, Any]:
        """Returns the shares with their times."""
        return {"busy": self._seen}
