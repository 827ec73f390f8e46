"""What the GPUs of a cluster can do: on each node a process that Ray gives its GPUs looks, before the work begins."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import ray

from unet_ray.cluster.tasks import outcome
from unet_ray.errors import TryAgain
from unet_ray.messages import count, say
from unet_ray.model.devices import has_bfloat16, require_gpu
from unet_ray.model.xla_check import xla_problem

WHOLE_NODE_S = 30.0
"""For all GPUs of a node at once: where another job has one, a single one (or a share) stands for all of its node."""

T = TypeVar("T")


class _Holder:
    """A process that has GPUs. An actor, as of a task nobody sees whether it waits for them or works."""

    def ready(self) -> None:
        """Returns when Ray has given it what it asks for."""

    def look(self, function: Callable[[], Any]) -> Any:
        """Calls a function beside these GPUs."""
        return function()


def ask_gpus(look: Callable[[], T], share: float, wait_s: float) -> dict[str, T]:
    """Returns what a function finds on the GPUs of each node, by the node's id.

    Nodes of which other jobs have all GPUs are left out, unless all nodes are like that: then it waits.

    Args:
        look: runs in a process of each node that Ray has given all of its GPUs, or a share of one.
        share: the GPUs, or part of one, that this job's processes reserve.
        wait_s: how long all GPUs may be in use.

    Raises:
        TryAgain: they were.
    """
    nodes = {node["NodeID"]: node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]}
    nodes = {node: n_gpus for node, n_gpus in nodes.items() if n_gpus >= 1}
    answers = _ask(look, nodes, WHOLE_NODE_S, at_least=len(nodes))
    others = {node: share for node in nodes if node not in answers}
    if others:
        answers |= _ask(look, others, WHOLE_NODE_S, at_least=len(others))
    if not answers:
        say(f"no GPU of {count(len(nodes), 'node')} is free yet; waiting up to {wait_s:g} s for one")
        answers = _ask(look, others, wait_s, at_least=1)
    if not answers:
        raise TryAgain(
            f"no GPU was free for {wait_s:g} s (--wait-for-resources-s): other work on this cluster has them; the same "
            "command goes on where this one stopped"
        )
    return answers


def require_usable_gpu(device: str, precision: str, wait_s: float) -> None:
    """Returns where TensorFlow can use the GPUs that Ray gives; to be called before anything is read.

    Each process that computes on one looks again: other nodes may come.

    Raises:
        UnusableGpu: it cannot, on a node of the cluster.
        TryAgain: all of them were in use for so long.
    """
    if device == "gpu":
        say("trying TensorFlow on the GPUs")
        ask_gpus(functools.partial(_look_at_gpu, precision), 1.0, wait_s)


def _look_at_gpu(precision: str) -> None:
    require_gpu()
    if precision == "auto":
        _has_bfloat16()


def all_have_bfloat16(share: float, wait_s: float) -> bool:
    """Whether the GPUs of all nodes multiply in bfloat16; arguments and errors as for `ask_gpus`."""
    return all(ask_gpus(_has_bfloat16, share, wait_s).values())


def _has_bfloat16() -> bool:
    return has_bfloat16("gpu")


def try_xla(share: float, wait_s: float) -> tuple[bool, list[str]]:
    """Whether XLA works on the GPUs of all nodes, and on which it was tried; says where it does not."""
    say("XLA is tried on the GPUs first; where CUDA has to compile its kernels, this takes minutes once")
    problems = ask_gpus(_problem_and_host, share, wait_s)
    for problem, host in problems.values():
        if problem:
            say(
                f"warning: {problem} on a GPU of node {host}; the job goes on without XLA, which takes longer, and its "
                "labels may differ in a few pixels from those with it"
            )
    return not any(problem for problem, _ in problems.values()), list(problems)


def _problem_and_host() -> tuple[str | None, str]:
    return xla_problem(), socket.gethostname()


def _ask(look: Callable[[], T], nodes: Mapping[str, float], wait_s: float, *, at_least: int) -> dict[str, T]:
    """The answers of nodes that give what is reserved of each within a time; returns once there are so many."""
    with _holders(nodes) as holders:
        ready = {holder.ready.remote(): node for node, holder in holders.items()}
        begun, _ = ray.wait(list(ready), num_returns=at_least, timeout=wait_s)
        looking = {ready[reference]: holders[ready[reference]].look.remote(look) for reference in begun}
        return {node: outcome(answer, list(looking.values())) for node, answer in looking.items()}


@contextlib.contextmanager
def _holders(nodes: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """A process for each node, which ends with the block and gives the GPUs back."""
    holder: Any = ray.remote(_Holder)
    holders = {
        node: holder.options(num_cpus=0, num_gpus=n_gpus, label_selector={"ray.io/node-id": node}).remote()
        for node, n_gpus in nodes.items()
    }
    try:
        yield holders
    finally:
        for actor in holders.values():
            ray.kill(actor)
