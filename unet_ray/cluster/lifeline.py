"""Ends a driver when a part of the Ray of its own dies, with a line and the exit code that says to try again.

Ray 2.60 itself ends a process at work with exit code 1 and no word: at once where the raylet or one of its agents dies,
after a minute where gcs_server does. An idle one waits for ever. Without the dashboard, the log monitor and the
autoscaler's monitor a job goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from unet_ray import stops
from unet_ray.cluster.processes import descendants
from unet_ray.errors import EXIT_TRY_AGAIN

_AGENTS = {
    "dashboard agent": ("ray::DashboardAgent", "/ray/dashboard/agent.py"),
    "runtime_env agent": ("ray::RuntimeEnvAgent", "/ray/_private/runtime_env/agent/main.py"),
}
"""Without which a raylet ends itself: their titles, and their programs, for as long as they have no title yet."""

_is_ending = threading.Event()


def end_with_ray() -> None:
    """Ends this process, as one that may be tried again, when a part of the Ray that it has started dies under it."""
    _is_ending.clear()
    parts: dict[int, str] = {}
    for pid, name in _parts().items():
        with contextlib.suppress(ProcessLookupError):  # then Ray does not start at all
            parts[os.pidfd_open(pid)] = name
    threading.Thread(target=_wait, args=[parts], daemon=True).start()


def expect_end() -> None:
    """Says that what dies from now on is ended by this process itself."""
    _is_ending.set()


def _parts() -> dict[int, str]:
    """Returns the names of the processes that Ray cannot do without, the raylet first, by their ids."""
    node: Any = ray._private.worker._global_node
    ids = {kind: [one.process.pid for one in started] for kind, started in node.all_processes.items()}
    parts = {pid: kind for kind in ("raylet", "gcs_server") for pid in ids.get(kind, ())}
    for pid in sorted(below for raylet in ids.get("raylet", ()) for below in descendants(raylet)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            for name, (title, program) in _AGENTS.items():
                # Not a word that holds it: a raylet's own command line has those of the agents in it.
                if words[0].startswith(title) or any(word.endswith(program) for word in words):
                    parts[pid] = name
    return parts


def _wait(parts: Mapping[int, str]) -> None:
    deaths = select.poll()
    for part in parts:
        deaths.register(part, select.POLLIN)
    dead = {part for part, _ in deaths.poll()}
    if ray.is_initialized() and not _is_ending.is_set():  # it is no longer while Ray is shut down in order
        _end(next(name for part, name in parts.items() if part in dead))
    for part in parts:
        os.close(part)


def _end(name: str) -> None:
    """Ends this process at once: in order, its end would wait for Ray, whose processes end with it."""
    if (number := stops.arrived()) is not None:  # all of a process group was told to stop, and Ray was faster
        line, code = stops.STOPPED.format(stops.WORDS[number]), 128 + number
    else:
        what = f"Ray's process on this machine ({name}) was ended, perhaps for want of memory"
        line, code = f"{what}; the same command goes on where this one stopped", EXIT_TRY_AGAIN
    if stops.takes_last_word():
        print(f"unet-ray: error: {line}", file=sys.stderr, flush=True)
    os._exit(code)
