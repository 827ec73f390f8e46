"""The Ray cluster a job runs on: connect to it, say what it has, wait for what is missing, map a function on it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Gauge

from unet_ray.cluster.processes import KEEP_MEMORY, descendants
from unet_ray.errors import EXIT_TRY_AGAIN, TryAgain
from unet_ray.messages import say
from unet_ray.storage import filesystems

WORKER_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorFlow's C++ notices of every worker, which name no trouble of the user's
    **KEEP_MEMORY,
}

_handed: tuple[tuple[str, str], dict[str, str]] | None = None
"""The connection to a Ray that was made here, and what that Ray's workers know of storage."""

ASK_EVERY_S = 2.0
"""How often the autoscaler is asked for what is still missing: of all requests it knows the last one only, and looks at
it every 5 s. An actor that Ray Data and Ray Train leave on the head (`AutoscalingCoordinator`, Ray 2.60) puts its own
in that place every 20 s, be it empty and its job long over: asked once, no node came in 600 s (in CI, 2026-11-22)."""

TASK_RETRIES = 2
"""Of a task whose process ended; Ray's default for actors is to try for ever."""

ROOM_EVERY_S = 2.0
"""How often is looked whether the cluster still has room."""

GAUGES_EVERY_S = 5.0
"""Ray 2.60 forgets a gauge 20 s after it was set (twice its `metrics_report_interval_ms`)."""


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
    stop_handler = signal.getsignal(signal.SIGTERM)
    if is_local():
        # Ray turns token authentication on for a local cluster, which is good, and warns of it, which helps nobody.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        # Workers have this environment anyway; with one of its own, none of those that Ray starts ahead would do.
        os.environ.update({**WORKER_ENVIRONMENT, **os.environ, **storage_variables})
        _start_ray(arguments)
        atexit.register(end_ray)
        _end_with_ray()
    else:
        address = os.environ["RAY_ADDRESS"]
        try:
            _knock(address)
            with _without_notice():
                ray.init(runtime_env={"env_vars": {**WORKER_ENVIRONMENT, **storage_variables}}, **arguments)
        except (OSError, RuntimeError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"RAY_ADDRESS is {address}; no cluster lets us in there: {cause}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop_handler)  # Ray's own prints a stack trace of C++ before it ends the process
    _handed = _connection(), storage_variables
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    where = "on this machine" if is_local() else f"at {os.environ['RAY_ADDRESS']}, nodes: {len(nodes)}"
    say(f"Ray {ray.__version__} {where}: {_text({key: have.get(key, 0) for key in ('CPU', 'GPU')})}")
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        say("warning: this Ray cluster has no authentication, whoever reaches it can run code; set RAY_AUTH_MODE=token")


def _connection() -> tuple[str, str]:
    """What no other connection to a Ray has: the node, and this process' job on its cluster."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


@contextlib.contextmanager
def without_ray_warnings() -> Iterator[None]:
    """What Ray 2.60 warns of and nobody can help: retries have no named parameter yet, its own copying of a context
    touches options that will go, and a wave of chunks that all crash keeps no actor busy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
        yield


@contextlib.contextmanager
def _without_notice() -> Iterator[None]:
    """Keeps one line off the terminal: Ray 2.60's C++ says on it that it heeds `RAY_BACKEND_LOG_LEVEL`.

    Everything else that is said meanwhile comes out at the end.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            os.write(2, b"".join(line for line in held if b"RAY_BACKEND_LOG_LEVEL" not in line))


def _start_ray(arguments: Mapping[str, Any]) -> None:
    """Starts a Ray of this machine. Ray 2.60 raises a bare Exception where its processes do not come up in time."""
    try:
        with _without_notice():
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
    held: list[int] = []  # a process id may be another's by the time it is killed
    for pid in {*started, *(below for parent in started for below in descendants(parent))}:
        with contextlib.suppress(ProcessLookupError):
            held.append(os.pidfd_open(pid))
    if in_order:
        ray.shutdown()
    for process in held:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def _end_with_ray() -> None:
    """Ends this process, as one that may be tried again, when the Ray that it started dies under it.

    Ray 2.60 itself ends a process at work with exit code 1 and no word, and leaves an idle one waiting for ever.
    """

    def wait(raylet: int) -> None:
        death = select.poll()
        death.register(raylet, select.POLLIN)
        death.poll()
        os.close(raylet)
        if ray.is_initialized():  # it is no longer while Ray is shut down in order
            what = "Ray's process on this machine (raylet) was ended, perhaps for want of memory"
            print(
                f"unet-ray: error: {what}; the same command goes on where this one stopped", file=sys.stderr, flush=True
            )
            os._exit(EXIT_TRY_AGAIN)  # in order, the end would wait for Ray; its processes end with this one

    node: Any = ray._private.worker._global_node
    for started in node.all_processes.get("raylet", ()):
        threading.Thread(target=wait, args=[os.pidfd_open(started.process.pid)], daemon=True).start()


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`; Ray 2.60 itself tries for ten minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def is_local() -> bool:
    """Whether the job runs on a Ray of its own, which nothing can add nodes to."""
    return "RAY_ADDRESS" not in os.environ


def resolve_device(device: str) -> str:
    """Returns `gpu` or `cpu` for `--device`; `auto` is a GPU where the cluster has one.

    Raises:
        ValueError: `gpu` was asked for and the cluster has none.
    """
    n_gpus = ray.cluster_resources().get("GPU", 0)
    if device == "gpu" and n_gpus == 0 and is_local():
        raise ValueError("--device is gpu and this machine has no GPU; use --device cpu, or auto to take what there is")
    resolved = device if device != "auto" else ("gpu" if n_gpus else "cpu")
    say(f"device: {resolved}" + (" (auto)" if device == "auto" else ""))
    return resolved


def wait_for_first_node(device: str, wait_s: float) -> None:
    """Returns once a node has what the device is: how to share nodes out is known only when there is one.

    An autoscaling cluster that has none yet gets the request for it.
    """
    wait_for_resources([{device.upper(): 1.0}], wait_s, "the job")


def wait_for_resources(bundles: list[dict[str, float]], wait_s: float, what: str) -> None:
    """Returns once the cluster has room for all bundles, each whole on one node.

    Ray itself would wait for ever, without a word (Ray 2.60, controller_failure_limit=-1).

    Args:
        bundles: resources of each process, as Ray names them, the same kinds in each: `[{"CPU": 1}, {"CPU": 1}]`.
        wait_s: seconds to wait for nodes that are still to come.
        what: what the bundles are, for the message: `2 training workers`.

    Raises:
        ValueError: it did not come in time; the message tells what is there.
    """
    wait_s = 0 if is_local() else wait_s
    deadline = time.monotonic() + wait_s
    asked_s = -math.inf
    try:
        while not _fits(bundles):
            want = {key: sum(bundle[key] for bundle in bundles) for key in bundles[0]}
            have = ray.cluster_resources()
            there = _text({key: have.get(key, 0) for key in want})
            each = f"want {_text(want)} ({_text(bundles[0])} each)" if len(bundles) > 1 else f"wants {_text(want)}"
            shortage = f"{what} {each}; the cluster has {there}"
            now_s = time.monotonic()
            if now_s >= deadline:
                waited = f" after {wait_s:g} s (--wait-for-resources-s)" if wait_s else ""
                raise ValueError(f"{shortage}{waited}; ask for fewer, or add nodes")
            if asked_s == -math.inf:
                say(f"{shortage}; waiting up to {wait_s:g} s for more nodes")
            if now_s - asked_s >= ASK_EVERY_S:
                request_resources(bundles=bundles)  # a hint to the autoscaler, where there is one
                asked_s = now_s
            time.sleep(0.5)
    finally:
        if asked_s != -math.inf:
            request_resources(num_cpus=0)  # the request would stand for ever, also of a job that was stopped


def worker_resources(cpus: int, device: str) -> dict[str, float]:
    """Returns what one worker reserves, as Ray names it."""
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if device == "gpu" else {})


def default_cpus(workers: int, device: str) -> int:
    """Returns the most CPUs that each of the workers can have at once, at least 1.

    Where some of the nodes with GPUs are yet to come: a GPU's share of the CPUs of those that are there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in nodes if device == "cpu" or node.get("GPU", 0) >= 1]

    def room(cpus: int) -> int:
        per_node = (
            min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if device == "gpu" else workers) for node in nodes
        )
        return int(sum(per_node))

    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    too_few_gpus = device == "gpu" and room(1) < workers
    share = int(min((node.get("CPU", 0) // node["GPU"] for node in nodes), default=1)) if too_few_gpus else 1
    return next((cpus for cpus in range(most, 1, -1) if room(cpus) >= workers), max(1, share))


class Room:
    """Whether the cluster still has room for what works on it, once nodes may have been lost.

    Ray Train itself waits for a lost node's place for ever, without a word (Ray 2.60).
    """

    def __init__(self, bundles: list[dict[str, float]], wait_s: float, what: str) -> None:
        """As for `wait_for_resources`."""
        self._bundles, self._wait_s, self._what = bundles, wait_s, what
        self._looked_s = self._missing_since_s = -math.inf

    def look(self) -> None:
        """Says it where room is missing; to be called often.

        Raises:
            TryAgain: it has been missing for longer than `wait_s`.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s < ROOM_EVERY_S:
            return
        self._looked_s = now_s
        if _fits(self._bundles):
            self._missing_since_s = -math.inf
        elif self._missing_since_s == -math.inf:
            self._missing_since_s = now_s
            say(f"warning: a node was lost, and {self._what} lack room; waiting up to {self._wait_s:g} s for another")
        elif now_s - self._missing_since_s > self._wait_s:
            raise TryAgain(
                f"a node was lost, and {self._what} had no room for {self._wait_s:g} s (--wait-for-resources-s); "
                "the same command goes on from the last checkpoint"
            )


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {key}{'s' * (value != 1)}" for key, value in resources.items())


def _fits(bundles: list[dict[str, float]]) -> bool:
    """Whether all bundles fit on the nodes that are alive, placed first-fit, the largest first."""
    free = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for bundle in sorted(bundles, key=lambda bundle: -sum(bundle.values())):
        room = next((node for node in free if all(node.get(k, 0) >= v for k, v in bundle.items())), None)
        if room is None:
            return False
        for key, value in bundle.items():
            room[key] = room.get(key, 0.0) - value
    return True


def map_on_cluster(act: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """As `map`, on the cluster: in order, as many at once as it has CPUs, an error as it was raised."""
    remote = ray.remote(max_retries=TASK_RETRIES)(act)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: list[Any] = []
    for item in items:
        if len(running) == at_once:
            yield outcome(running.pop(0), running)
        running.append(remote.remote(item))
    while running:
        yield outcome(running.pop(0), running)


def outcome(reference: Any, others: Sequence[Any] = ()) -> Any:
    """Returns what a task returned, or raises its error as it was raised; `others` are then waited for.

    Raises:
        TryAgain: Ray has given the task up.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        for other in others:  # Ray prints the stack trace of a failure that nobody looked at (Ray 2.60)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(other)
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise given_up(error) from error


def given_up(error: BaseException) -> TryAgain:
    """What Ray says of work that it does not try any more: the death of a process or of a node, above all."""
    said = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return TryAgain(f"Ray gave up work that it had begun ({what}); the same command goes on where this one stopped")


class Gauges:
    """Numbers of a job that the cluster's Prometheus sees while the block runs, be they set once or often.

    Ray's agent on each node exports them, as `ray_<prefix>_<name>`.
    """

    def __init__(self, prefix: str, descriptions: Mapping[str, str], *, every_s: float = GAUGES_EVERY_S) -> None:
        self._gauges = {name: Gauge(f"{prefix}_{name}", text) for name, text in descriptions.items()}
        self._values: dict[str, float] = {}
        self._every_s = every_s
        self._over = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, daemon=True)

    def set(self, name: str, value: float) -> None:
        """Sets one of the numbers."""
        self._values[name] = value
        self._gauges[name].set(value)

    def _repeat(self) -> None:
        while not self._over.wait(self._every_s):
            for name, value in list(self._values.items()):
                self._gauges[name].set(value)

    def __enter__(self) -> Self:
        self._repeating.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._repeating.join()
