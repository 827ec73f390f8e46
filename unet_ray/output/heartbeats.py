"""Signs of life of the jobs on one output: `OUT/_work/jobs/JOB.json`, written anew every few seconds.

Nothing of the work depends on them: two jobs write the same bytes under the same keys. They warn a second job, and keep
`--overwrite` from an output on which another job works. Whether a job lives is asked of its process where that is a
process of this machine; elsewhere by watching whether the sign changes, since two machines' clocks are not compared.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from unet_ray import storage
from unet_ray.errors import TryAgain
from unet_ray.messages import shown_path
from unet_ray.storage.sealed import sealed, unsealed

INTERVAL_S = 15.0
"""Between two signs."""

END_S = 5.0
"""For which a job waits until its sign of life is gone: a store that does not answer must not hold up its end."""

_MAX_INTERVAL_S = 60.0  # believed of a sign

_LOOK_S = 0.5  # how often a sign is read that is watched


def new_job() -> str:
    """Returns a name for this job's process."""
    return f"{os.uname().nodename}-{os.getpid()}-{time.time_ns() % 10**9:09d}"


def write(out: str, job: str, *, interval_s: float = INTERVAL_S) -> None:
    """Leaves a sign of life of this process, a job on this output."""
    sign = {"time_s": time.time(), "interval_s": interval_s, "process": _this_process()}
    storage.write_whole(_uri(out, job), sealed(sign))


def end(out: str, job: str) -> None:
    """Takes the sign of life away, and its folders where nothing else is in them."""
    storage.delete(_uri(out, job))
    for folder in ("_work/jobs", "_work"):
        storage.delete_if_empty(storage.join(out, folder))


def _uri(out: str, job: str) -> str:
    return storage.join(out, "_work", "jobs", f"{job}.json")


@contextlib.contextmanager
def beating(out: str, job: str, on_beat: Callable[[], None]) -> Iterator[None]:
    """Gives signs of life of this job while the block runs.

    Args:
        out: the output.
        job: this job's name.
        on_beat: called beside each sign; what it raises of storage's trouble is passed over.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # it only serves to warn; the work itself will say what storage has
                write(out, job)
                on_beat()
            over.wait(INTERVAL_S)
        with contextlib.suppress(OSError):
            end(out, job)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(END_S)


def other_job(out: str, job: str, *, within_s: float = 60.0) -> str | None:
    """Returns the name of another job that gave a sign of life just now and is not known to be dead, else None."""
    for other, sign in _signs(out).items():
        if other != job and time.time() - sign["time_s"] < within_s and _lives(sign) is not False:
            return other
    return None


def refuse_living(out: str) -> None:
    """Raises TryAgain where another job works on an output: what it writes would lie among what is written anew."""
    watched = {}
    for job, sign in _signs(out).items():
        lives = _lives(sign)
        if lives:
            raise _working(out, job)
        if lives is None:
            watched[job] = sign
    until_s = time.monotonic() + 2 * max(map(_interval_s, watched.values()), default=0)
    while watched and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
        now = _signs(out)
        for job, sign in watched.items():
            if job in now and now[job] != sign:
                raise _working(out, job)
        watched = {job: sign for job, sign in watched.items() if job in now}


def _interval_s(sign: Mapping[str, Any]) -> float:
    """Between two signs of a job by what it says; what it says may be anything."""
    value: Any = sign.get("interval_s")
    return min(value, _MAX_INTERVAL_S) if type(value) in (int, float) and value > 0 else INTERVAL_S


def _working(out: str, job: str) -> TryAgain:
    return TryAgain(
        f"job {job} works on {shown_path(out)}; stop it before --overwrite, wait for its end, or give another --out"
    )


def _signs(out: str) -> dict[str, dict[str, Any]]:
    """The last sign of each job by its name; what is no sign is passed over."""
    signs = {}
    for file in storage.list_folder(storage.join(out, "_work", "jobs")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            sign = unsealed(storage.read_bytes(file.uri))
            if isinstance(sign.get("time_s"), float):
                signs[file.path.removesuffix(".json")] = sign
    return signs


def _lives(sign: Mapping[str, Any]) -> bool | None:
    """Whether the process that left a sign lives; None where it is none of this machine's."""
    process, this_process = sign.get("process"), _this_process()
    if not isinstance(process, dict) or {**process, "pid": 0, "started": 0} != {**this_process, "pid": 0, "started": 0}:
        return None
    pid, started = process.get("pid"), process.get("started")
    return _start_of(pid) == started if type(pid) is int and isinstance(started, str) else None


@cache
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _this_process() -> dict[str, Any]:
    """By what a process is known on this machine: processes of another container have the same numbers."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {
        "host": os.uname().nodename,
        "boot_id": _boot_id(),
        "pid_namespace": namespace,
        "pid": pid,
        "started": _start_of(pid),
    }


def _start_of(pid: object) -> str | None:
    """When a process started, in ticks since the boot; None where there is none, or only what a dead one left."""
    try:
        # The name in the second field, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, ValueError, IndexError):
        return None
