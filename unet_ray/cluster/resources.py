"""What the cluster has: which device, how many CPUs a worker gets, waiting for what is missing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import ray
from ray.autoscaler.sdk import request_resources

from unet_ray.cluster import autoscaler
from unet_ray.cluster.connection import is_local
from unet_ray.errors import TryAgain
from unet_ray.messages import amounts, say

ASK_EVERY_S = 2.0
"""How often the autoscaler is asked for what is still missing: of all requests it knows the last one only, and looks at
it every 5 s. An actor that Ray Data and Ray Train leave on the head (`AutoscalingCoordinator`, Ray 2.60) puts its own
in that place every 20 s, be it empty and its job long over: asked once, no node came in 600 s (in CI, 2026-11-22)."""

ROOM_EVERY_S = 2.0
"""How often is looked whether the cluster still has room."""


def resolve_device(device: str) -> str:
    """Returns `gpu` or `cpu` for `--device`; `auto` is a GPU where the cluster has one, or its autoscaler can add one.

    Raises:
        ValueError: `gpu` was asked for and the cluster has none.
        TryAgain: the cluster's autoscaler does not say what it can add.
    """
    n_gpus = ray.cluster_resources().get("GPU", 0)
    if device == "gpu" and n_gpus == 0 and is_local():
        raise ValueError("--device is gpu and this machine has no GPU; use --device cpu, or auto to take what there is")
    if device != "auto":
        say(f"device: {device}")
        return device
    comes = not n_gpus and autoscaler.adds_nodes() and autoscaler.can_come({"GPU": 1.0})
    resolved = "gpu" if n_gpus or comes else "cpu"
    say(f"device: {resolved} (auto{', a node with one can come' if comes else ''})")
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
        while not fits(alive_nodes(), bundles):
            want = {key: sum(bundle[key] for bundle in bundles) for key in bundles[0]}
            have = ray.cluster_resources()
            there = amounts({key: have.get(key, 0) for key in want})
            each = (
                f"want {amounts(want)} ({amounts(bundles[0])} each)" if len(bundles) > 1 else f"wants {amounts(want)}"
            )
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
    """Returns `cpus_each` of the cluster as it is."""
    return cpus_each(alive_nodes(), workers, device)


def cpus_each(nodes: Sequence[Mapping[str, float]], workers: int, device: str) -> int:
    """Returns the most CPUs that each of the workers can have at once, at least 1.

    Where some of the nodes with GPUs are yet to come: a GPU's share of the CPUs of those that are there.
    """
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
        self._checked_s = self._missing_since_s = -math.inf

    def look(self) -> None:
        """Says it where room is missing; to be called often.

        Raises:
            TryAgain: it has been missing for longer than `wait_s`.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s < ROOM_EVERY_S:
            return
        self._checked_s = now_s
        if fits(alive_nodes(), self._bundles):
            self._missing_since_s = -math.inf
        elif self._missing_since_s == -math.inf:
            self._missing_since_s = now_s
            say(f"warning: a node was lost, and {self._what} lack room; waiting up to {self._wait_s:g} s for another")
        elif now_s - self._missing_since_s > self._wait_s:
            raise TryAgain(
                f"a node was lost, and {self._what} had no room for {self._wait_s:g} s (--wait-for-resources-s); "
                "the same command goes on from the last checkpoint"
            )


def alive_nodes() -> list[dict[str, float]]:
    """Returns the resources of each node that is alive, as Ray names them."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpu_kinds() -> list[str]:
    """Returns the kinds of GPUs on the nodes that are there, as Ray names them (`L4`); none where no Ray can tell."""
    prefix, nodes = "accelerator_type:", alive_nodes() if ray.is_initialized() else []
    return sorted({key.removeprefix(prefix) for node in nodes for key in node if key.startswith(prefix)})


def fits(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> bool:
    """Whether all bundles fit on nodes with these resources, placed first-fit, the largest first.

    Ray counts ten-thousandths, in which shares of a GPU add up: `1 - 0.1 - … - 0.1` is a bit less than nothing.
    """
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: -sum(bundle.values())):
        room = next((node for node in free if all(node.get(k, 0) > v - 1e-5 for k, v in bundle.items())), None)
        if room is None:
            return False
        for key, value in bundle.items():
            room[key] = room.get(key, 0.0) - value
    return True
