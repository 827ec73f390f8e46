"""What a job's machines must have before it begins: each sees its local paths."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray import storage
from unet_ray.messages import say

LOOK_TIMEOUT_S = 300.0
"""For a node that has yet to make its environment and start a process."""

_JOB_FOLDER = f"{os.sep}runtime_resources{os.sep}working_dir_files{os.sep}"
"""Part of the path of the folder that Ray unpacks for a submitted job (Ray 2.60)."""


def require_seen_by_all(inputs: Mapping[str, Iterable[str]], out: str | None) -> None:
    """Raises ValueError where a machine that may work for this job would not see a local path as this one does.

    Each other machine of the cluster is asked by one task: whether it has the inputs, and whether it finds in the
    output's place what was written here. Paths on a shared disk pass. Object stores and a cluster of one machine are
    not asked; nor are machines without CPUs, which get no work, and such as come later.

    Args:
        inputs: resolved URIs by the option that gave them.
        out: resolved URI of the output, where workers write to it.
    """
    if out is not None and storage.is_local(out) and _JOB_FOLDER in out:
        raise ValueError(
            f"--out {out} lies in the folder that Ray unpacked for this job, which goes when the job ends; give a URI "
            "or an absolute path"
        )
    paths = {path: option for option, uris in inputs.items() for path in uris if storage.is_local(path)}
    out = out if out is not None and storage.is_local(out) else None
    this_address, others = _machines()
    if not others or not (paths or out):
        return
    with _mark(out) as mark:
        looking = {address: _look_at(node_id, [*paths, *mark]) for address, node_id in others.items()}
        for address, answer in looking.items():
            try:
                missing = ray.get(answer, timeout=LOOK_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                say(f"warning: whether node {address} sees local paths is not known ({type(error).__name__})")
                continue
            if missing:
                option, path = next(((paths[path], path) for path in missing if path in paths), ("--out", str(out)))
                raise ValueError(
                    f"{option} {path} is a path of {this_address} that the node {address} does not see; with several "
                    "machines, give a URI that all of them reach (s3://…), or mount that folder at the same place on "
                    "each"
                )


def _machines() -> tuple[str, dict[str, str]]:
    """Returns this machine's address, and of each other one that may get work its address and a node on it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    mine = ray.get_runtime_context().get_node_id()
    this_address = next(node["NodeManagerAddress"] for node in nodes if node["NodeID"] == mine)
    working = [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
    return this_address, {
        node["NodeManagerAddress"]: node["NodeID"] for node in working if node["NodeManagerAddress"] != this_address
    }


@contextmanager
def _mark(out: str | None) -> Iterator[list[str]]:
    """A new file where the output lies or will lie, while the block runs: in the nearest folder that is there."""
    if out is None:
        yield []
        return
    folder = out
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    mark = storage.join(folder, f"{storage.TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    storage.write_whole(mark, b"Is this folder the same on all machines?\n")
    try:
        yield [mark]
    finally:
        storage.delete(mark)


def _look_at(node_id: str, paths: list[str]) -> ray.ObjectRef:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(_missing).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(paths)


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
