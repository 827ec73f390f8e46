"""The Ray that a job runs on: joins it or starts it, with a time limit, and ends what was started."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from unet_ray import streams
from unet_ray.cluster import lifeline
from unet_ray.cluster.processes import KEEP_MEMORY, descendants
from unet_ray.cluster.watchdog import Watchdog
from unet_ray.errors import EXIT_TRY_AGAIN, TryAgain
from unet_ray.messages import amounts, say
from unet_ray.storage import filesystems

WORKER_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorFlow's C++ notices of every worker, which name no trouble of the user's
    **KEEP_MEMORY,
}

CUDA_CACHE = ("CUDA_CACHE_PATH", "CUDA_CACHE_MAXSIZE")
"""Where a driver keeps compiled kernels, as CUDA names it; workers on other nodes get what is set here."""

START_TIMEOUT_S = 300.0
"""After which a Ray that has neither started nor let us in is given up."""

MIN_OPEN_FILES = 128
"""Of each process. With 64 a raylet of 2 CPUs dies without a word, with 96 a job of 2,000 frames goes through."""

_NOTICE = re.compile(rb".*RAY_BACKEND_LOG_LEVEL")
"""Ray 2.60's C++ says on the terminal that it heeds this variable."""

_handed: tuple[tuple[str, str], dict[str, str]] | None = None
"""The connection to a Ray that was made here, and what that Ray's workers know of storage."""


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (set inside a submitted job), or starts a Ray of this machine alone.

    What says how storage is reached (`--storage-options`, `FSSPEC_…`, endpoint and region) is handed to the workers;
    credentials are not: on a cluster its nodes have their own.

    Raises:
        ValueError: `RAY_ADDRESS` names a cluster that does not answer, or Ray runs already with other storage options.
        TryAgain: Ray did not start.
    """
    global _handed
    storage_variables = filesystems.worker_environment(inherited=is_local())
    if ray.is_initialized():
        if _handed and _handed[0] == _connection() and _handed[1] != storage_variables:
            raise ValueError("Ray runs already, and its workers have other storage options; call ray.shutdown() first")
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns of this change of default
    # Ray Data makes Ray call every actor that it can restart an error, on the terminal (Ray 2.60).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Of more workers than CPUs, Ray ends each that was idle for a second (Ray 2.60), and starts another for the next
    # task, whose imports alone take 1.3 s of a core (`time python -c "import unet_ray.labelling.waves"`, 2026-11-21).
    # Decoding, labelling and writing share CPUs, and take turns by the chunk.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _require_files()
    stop_handler = signal.getsignal(signal.SIGTERM)
    say("starting Ray on this machine" if is_local() else f"joining the Ray cluster at {os.environ['RAY_ADDRESS']}")
    if is_local():
        # Ray turns token authentication on for a local cluster, which is good, and warns of it, which helps nobody.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        # Workers have this environment anyway; with one of its own, none of those that Ray starts ahead would do.
        os.environ.update({**WORKER_ENVIRONMENT, **os.environ, **storage_variables})
        with limited("the start of Ray on this machine", START_TIMEOUT_S):
            _start_ray(arguments)
        atexit.register(end_ray)
        lifeline.end_with_ray()
    else:
        address = os.environ["RAY_ADDRESS"]
        try:
            _knock(address)
            with (
                streams.without_lines(_NOTICE),
                limited(f"joining the Ray at {address}, which may want another token,", START_TIMEOUT_S),
            ):
                cuda_cache = {name: os.environ[name] for name in CUDA_CACHE if name in os.environ}
                variables = {**WORKER_ENVIRONMENT, **cuda_cache, **storage_variables}
                ray.init(runtime_env={"env_vars": variables}, **arguments)
                lifeline.end_with_cluster()
        except (OSError, RuntimeError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"RAY_ADDRESS is {address}; no cluster lets us in there: {cause}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop_handler)  # Ray's own prints a stack trace of C++ before it ends the process
    _handed = _connection(), storage_variables
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    where = "on this machine" if is_local() else f"at {os.environ['RAY_ADDRESS']}, nodes: {len(nodes)}"
    say(f"Ray {ray.__version__} {where}: {amounts({key: have.get(key, 0) for key in ('CPU', 'GPU')})}")
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        say("warning: this Ray cluster has no authentication, whoever reaches it can run code; set RAY_AUTH_MODE=token")


def _require_files() -> None:
    """Raises ValueError where Ray's processes could not open their files; it raises the soft limit itself."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < MIN_OPEN_FILES:
        raise ValueError(
            f"a process may have {most:,} open files here, and Ray needs {MIN_OPEN_FILES:,}; raise the limit "
            "(ulimit -n, LimitNOFILE of systemd)"
        )


@contextlib.contextmanager
def limited(phase: str, timeout_s: float) -> Iterator[None]:
    """Ends this process, as one that may be tried again, where the block takes longer: a line says where it was.

    Nothing else would end a driver that waits inside Ray for what does not come.
    """

    def give_up(position: str) -> None:
        print(
            f"unet-ray: error: {phase} took longer than {timeout_s:.0f} s; it was in {position}; the same command "
            "goes on where this one stopped",
            file=sys.stderr,
            flush=True,
        )
        end_ray(in_order=False)

    with Watchdog(timeout_s, give_up, exit_code=EXIT_TRY_AGAIN).watching():
        yield


def _connection() -> tuple[str, str]:
    """What no other connection to a Ray has: the node, and this process' job on its cluster."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def _start_ray(arguments: Mapping[str, Any]) -> None:
    """Starts a Ray of this machine. Ray 2.60 raises a bare Exception where its processes do not come up in time."""
    try:
        with streams.without_lines(_NOTICE):
            ray.init(address="local", include_dashboard=False, **arguments)
    except Exception as error:
        ray.shutdown()
        cause = " ".join(str(error).split()).rstrip(".")
        raise TryAgain(
            f"Ray did not start on this machine: {cause}; is it very busy? Try the same command again"
        ) from error


def end_ray(*, in_order: bool = True) -> None:
    """Ends the Ray that this process has started, if any, and all of its processes; or kills them at once.

    An agent that is still starting would wait a minute for those of Ray that are gone already (Ray 2.60).
    """
    node = ray._private.worker._global_node
    kinds: Mapping[str, Any] = {} if node is None else node.all_processes
    started: list[int] = [one.process.pid for kind in kinds.values() for one in kind]
    handles: list[int] = []  # a process id may be another's by the time it is killed
    for pid in {*started, *(below for parent in started for below in descendants(parent))}:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    lifeline.expect_end()
    if in_order:
        ray.shutdown()
    for process in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def disconnect() -> None:
    """Ends the connection that `connect` has made, and with it all that this job holds in the cluster.

    A connection of the caller's own stays: only that caller knows what else it is for.
    """
    if ray.is_initialized() and _handed and _handed[0] == _connection():
        end_ray()


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`; Ray 2.60 itself tries for ten minutes.

    Raises:
        ValueError: an address of another kind, of the dashboard, say, or of Ray Client.
    """
    if address in ("auto", "local"):  # words of Ray's own: what runs on this machine, and one more
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError(
            f"RAY_ADDRESS is {address}; give host:port of the cluster's head, such as 10.0.0.5:6379, or auto "
            "(http://… is its dashboard, which `ray job submit` takes)"
        )
    socket.create_connection((host, int(port)), timeout=10).close()


def is_local() -> bool:
    """Whether the job runs on a Ray of its own, which nothing can add nodes to."""
    return "RAY_ADDRESS" not in os.environ
