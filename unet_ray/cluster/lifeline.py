"""Ends a driver when its Ray loses a part that it needs, with a line and the exit code that says to try again.

Ray 2.60 itself ends a process at work with exit code 1 and no word: at once where the raylet or one of its agents dies,
after a minute where gcs_server does. An idle one waits for ever. Without the dashboard, the log monitor and the
autoscaler's monitor a job goes on.

Of a Ray of its own a driver knows the processes. On somebody's cluster it asks the head whether it still answers: with
Redis behind it a new one may take its place within Ray's minute.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading
import time
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

_RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The seconds that Ray 2.60 itself waits for a head, which each process reads from its own environment."""

HEAD_PATIENCE = 0.8
"""Share of the time that Ray waits for a lost head, after which the driver ends: before Ray ends it."""

_is_ending = threading.Event()


def end_with_ray() -> None:
    """Ends this process, as one that may be tried again, when a part of the Ray that it has started dies under it."""
    _is_ending.clear()
    parts: dict[int, str] = {}
    for pid, name in _parts().items():
        with contextlib.suppress(ProcessLookupError):  # then Ray does not start at all
            parts[os.pidfd_open(pid)] = name
    threading.Thread(target=_wait, args=[parts, _node()], daemon=True).start()


def end_with_cluster() -> None:
    """Ends this process, as one that may be tried again, when the cluster it has joined loses its head or this node."""
    _is_ending.clear()
    with contextlib.suppress(OSError):  # a raylet of another container cannot be watched
        threading.Thread(target=_wait, args=[{os.pidfd_open(_raylet()): "raylet"}, _node()], daemon=True).start()
    address = ray.get_runtime_context().gcs_address
    ray_waits_s = float(os.environ.get(_RAY_WAITS, "60"))
    threading.Thread(target=_knock_again, args=[address, HEAD_PATIENCE * ray_waits_s, _node()], daemon=True).start()


def expect_end() -> None:
    """Says that what dies from now on is ended by this process itself."""
    _is_ending.set()


def _node() -> Any:
    """Returns what this process' connection to a Ray is: another one is another object."""
    return ray._private.worker._global_node


def _is_left(node: Any) -> bool:
    """Whether this process has left that Ray, or is about to: by `expect_end`, or by `ray.shutdown` of its caller."""
    return _is_ending.is_set() or not ray.is_initialized() or _node() is not node


def _parts() -> dict[int, str]:
    """Returns the names of the processes that Ray cannot do without, the raylet first, by their ids."""
    node = _node()
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


def _raylet() -> int:
    """Returns the id of the process that listens at the socket by which this driver speaks to its node; unix(7)."""
    node = _node()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(node.raylet_socket_name)
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def _wait(parts: Mapping[int, str], node: Any) -> None:
    deaths = select.poll()
    for part in parts:
        deaths.register(part, select.POLLIN)
    dead = {part for part, _ in deaths.poll()}
    if not _is_left(node):
        name = next(name for part, name in parts.items() if part in dead)
        _end(f"Ray's process on this machine ({name}) was ended, perhaps for want of memory")
    for part in parts:
        os.close(part)


def _knock_again(address: str, patience_s: float, node: Any) -> None:
    """Returns when the process leaves the cluster; ends it when nobody has answered at an address for some seconds."""
    answered_at = time.monotonic()
    while not _is_ending.wait(patience_s / 20) and not _is_left(node):
        if _answers(address, patience_s / 4):
            answered_at = time.monotonic()
        elif time.monotonic() - answered_at > patience_s:
            _end(f"the cluster's head (gcs_server at {address}) has not answered for {patience_s:.0f} s")


def _answers(address: str, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
        return True
    return False


def _end(what: str) -> None:
    """Ends this process at once: in order, its end would wait for Ray."""
    if (number := stops.arrived()) is not None:  # all of a process group was told to stop, and Ray was faster
        line, code = stops.STOPPED.format(stops.WORDS[number]), 128 + number
    else:
        line, code = f"{what}; the same command goes on where this one stopped", EXIT_TRY_AGAIN
    if stops.takes_last_word():
        print(f"unet-ray: error: {line}", file=sys.stderr, flush=True)
    os._exit(code)
