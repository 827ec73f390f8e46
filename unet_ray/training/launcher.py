"""Ray Train at work: an actor that starts the workers and hears them, and the driver that waits for it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import types
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.cluster.connection import disconnect
from unet_ray.cluster.resources import (
    Room,
    worker_resources,
)
from unet_ray.cluster.watchdog import Watchdog
from unet_ray.config import TrainConfig
from unet_ray.errors import JobFailed, TryAgain, UnusableNetwork
from unet_ray.messages import count, reason_of, say
from unet_ray.model.devices import OutOfDeviceMemory, UnusableGpu
from unet_ray.training.events import Event, Failed, Finished, PhaseBegun, Stuck
from unet_ray.training.mlflow_record import MlflowRecord
from unet_ray.training.monitor import Monitor
from unet_ray.training.sample_log import SampleLog
from unet_ray.training.task import Group, WorkerTask


class Mailbox:
    """Events of the workers, until the driver takes them: a part of an actor, which all of them reach."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Adds one event."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """Returns the events since the last call."""
        events, self._events = self._events, []
        return events


HEALTH_CHECK_TIMEOUT_S = 60
"""After which a worker that does not answer (stopped, or its node gone) is given up; Ray's default is 600."""

RESIZE_INTERVAL_S = 60.0
"""How often a group of `--workers MIN:MAX` looks whether it may grow: growing starts it again from a checkpoint."""
POLL_INTERVAL_S = 0.2
"""How often the driver looks for the workers' events."""
LAST_WORD_S = 10.0
"""How long a worker that ends itself waits to be heard."""


FINAL = (UnusableGpu, OutOfDeviceMemory, UnusableNetwork)
"""Errors of a worker that another group of workers would end with, too."""


def _work(loop_config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    context, mailbox, task = ray.train.get_context(), loop_config["mailbox"], loop_config["task"]
    rank = context.get_world_rank()

    def give_up(position: str) -> None:
        line = f"worker {rank} has not loaded TensorFlow for {task.start_timeout_s:.0f} s and ends itself"
        _tell(mailbox, Stuck(line=f"{line}; it was in {position}"))

    if rank == 0:
        _tell(mailbox, PhaseBegun(line=f"loading TensorFlow, in {count(context.get_world_size(), 'worker')}"))
    # Here: the driver, the launcher and Ray Train's controller need no TensorFlow (2.6 s).
    with Watchdog(task.start_timeout_s, give_up).watching():
        from unet_ray.training.worker import Worker

    group = Group(
        rank=rank,
        n_workers=context.get_world_size(),
        agree=broadcast_from_rank_zero,
        tell=lambda event: _tell(mailbox, event),
    )
    Worker(task, group).run()


def _tell(mailbox: Any, event: Event) -> None:
    put = mailbox.put.remote(event)
    if isinstance(event, Failed | Finished):  # the last before the worker ends, and what it holds with it
        ray.get(put)
    if isinstance(event, Stuck):  # it ends whether it is heard or not
        ray.wait([put], timeout=LAST_WORD_S)


class Launcher(Mailbox):
    """An actor that runs Ray Train and takes what its workers tell, in one process, started beside the reading."""

    def __init__(self) -> None:
        super().__init__()
        # Ray Train's module looks whether TensorFlow is there, and names its types; only workers need it, of which this
        # is none. 2.3 s of a core, while all cores read frames (2 cores, 2026-11-30: 1.0 and 3.3 s).
        sys.modules["tensorflow"] = _StandIn("tensorflow")
        try:
            import ray.train.tensorflow
        finally:
            del sys.modules["tensorflow"]
        # Else the controller would import TensorFlow, too, only to learn the name of this class.
        ray.cloudpickle.register_pickle_by_value(ray.train.tensorflow.config)

    @ray.method(concurrency_group="fit")
    def fit(self, task: WorkerTask, mailbox: Any, resize_interval_s: float) -> list[Exception]:
        """Runs the workers to the end; returns nothing, or what they died of the last time."""
        from ray.train.tensorflow import TensorflowTrainer

        # A process that asks every 5 s whether a node will go, and tells the workers, who do not ask.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HEALTH_CHECK_TIMEOUT_S))
        # Of those that wait for a worker before the first epoch; Ray's default is for ever.
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(task.start_timeout_s))
        fewest, most = task.config.worker_range()
        with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
            trainer = TensorflowTrainer(
                _work,
                train_loop_config={"task": task, "mailbox": mailbox},
                scaling_config=ScalingConfig(
                    num_workers=most if fewest == most else (fewest, most),
                    elastic_resize_monitor_interval_s=resize_interval_s,
                    use_gpu=task.device == "gpu",
                    resources_per_worker=worker_resources(task.cpus, task.device),
                    # A node's memory and its way to the storage are shared; GPUs of one node talk faster.
                    placement_strategy="PACK" if task.device == "gpu" else "SPREAD",
                ),
                run_config=_run_config(folder, task.config.max_failures),  # type: ignore[arg-type]  # of its version 1
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                # As text, but for our own: TensorFlow's errors would make the driver load TensorFlow.
                if isinstance(final := getattr(error, "controller_failure", None), FINAL):
                    return [final]
                causes = list(getattr(error, "worker_failures", {}).values()) or [error]
                return [
                    cause if _is_ours(cause) else RuntimeError(f"{type(cause).__name__}: {reason_of(cause)}")
                    for cause in causes
                ]
        return []


def _run_config(folder: str, max_failures: int) -> RunConfig:
    """Returns how Ray Train retries, and where its own notes go; checkpoints lie in RUN (see `checkpoints`)."""

    # Another group of workers would end like this one. Ray Train (2.60) retries every error of a worker and none of a
    # callback. This class is local so that it is sent as code, and the controller need not load this module.
    class FinalFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, FINAL):
                    raise error

    return RunConfig(
        name="run",
        storage_path=folder,
        failure_config=FailureConfig(max_failures=max_failures),
        callbacks=[FinalFailures()],
        logging_config=LoggingConfig(log_level="ERROR"),
    )


class _StandIn(types.ModuleType):
    """A module that has every name, each of them such a module."""

    def __getattr__(self, name: str) -> types.ModuleType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")


def start_launcher() -> Any:
    """Starts it on the driver's node: should another node be lost, it is not the one that holds the run."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # its annotations do not know of concurrency groups (Ray 2.60)
    return remote(num_cpus=0, scheduling_strategy=this_node, concurrency_groups={"fit": 1})(Launcher).remote()


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, ValueError | JobFailed | OSError) and "\n" not in str(error)


def _take(launcher: Any, timeout_s: float) -> list[Event]:
    """Returns the workers' events since the last call."""
    try:
        return ray.get(launcher.take.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise _no_start(f"Ray has not started the process that starts the workers for {timeout_s:.0f} s") from error


def _no_start(what: str) -> TryAgain:
    return TryAgain(f"{what}; perhaps other jobs hold the cluster's CPUs or GPUs; the same command goes on")


def run_workers(
    config: TrainConfig, task: WorkerTask, launcher: Any, record: MlflowRecord | None, samples: SampleLog | None = None
) -> Monitor:
    """Runs Ray Train's workers to the end, and shows what they say meanwhile."""
    monitor = Monitor(config.out, config.epochs, record, samples)
    say("starting the workers")
    fitting = launcher.fit.remote(task, launcher, RESIZE_INTERVAL_S)
    fewest, _ = config.worker_range()
    room = Room(
        [worker_resources(task.cpus, task.device)] * fewest, config.wait_for_resources_s, count(fewest, "worker")
    )
    done: list[Any] = []
    # A worker that has started and gets nowhere ends itself before that, and says so.
    start_timeout_s = 2 * task.start_timeout_s + config.wait_for_resources_s
    heard_s = time.monotonic()
    try:
        with monitor.gauges:
            while not done:
                room.look()
                done, _ = ray.wait([fitting], timeout=POLL_INTERVAL_S)
                for event in _take(launcher, start_timeout_s):
                    monitor.handle(event)
                    heard_s = time.monotonic()
                if not monitor.n_workers and time.monotonic() - heard_s > start_timeout_s:
                    raise _no_start(f"no worker has started for {start_timeout_s:.0f} s")
        causes = ray.get(fitting)
    except TryAgain:
        # Ray Train's reservation of CPUs outlives all of its actors, and would take them when there is room (Ray 2.60).
        disconnect()
        raise
    if monitor.error is not None:
        raise monitor.error
    for cause in causes:
        if _is_ours(cause):
            raise cause
    if causes:
        raise JobFailed(
            f"workers were lost more than {config.max_failures} times (--max-failures), the last time by {causes[0]}; "
            "the same command goes on from the last checkpoint"
        )
    return monitor
