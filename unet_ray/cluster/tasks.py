"""Ray tasks: a function mapped on the cluster, errors as they were raised."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.util.annotations import RayDeprecationWarning

from unet_ray.errors import TryAgain

TASK_RETRIES = 2
"""Of a task whose process ended; Ray's default for actors is to try for ever."""


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
def data_context(**options: Any) -> Iterator[None]:
    """Within the block Ray Data plans with these options of its `DataContext`, and without bars; its own stay as they
    were. What it says to the log is not the user's."""
    from ray.data import DataContext  # 0.8 s that a job need not wait for before its Ray has started

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with without_ray_warnings():
        context = copy.deepcopy(DataContext.get_current())
        for name, value in {"enable_progress_bars": False, "print_on_execution_start": False, **options}.items():
            setattr(context, name, value)
        with DataContext.current(context):
            yield


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
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return TryAgain(f"Ray gave up work that it had begun ({what}); the same command goes on where this one stopped")
