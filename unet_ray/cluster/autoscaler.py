"""What a cluster's autoscaler says: whether it adds nodes, and whether one with certain resources can ever come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made by Cython
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # made at import

from unet_ray.cluster.connection import is_local
from unet_ray.errors import TryAgain

ANSWER_TIMEOUT_S = 120.0
"""After which an autoscaler that does not answer is given up; it looks at the requests every 5 s."""


def adds_nodes() -> bool:
    """Whether the cluster has an autoscaler that adds nodes, and says which it cannot add: version 2 of Ray's.

    `ray up` and KubeRay have had it by default since Ray 2.50. On nodes that were started by hand one runs, too, where
    `RAY_enable_autoscaler_v2` is set; it knows no type of theirs, and adds none.
    """
    if is_local() or not is_autoscaler_v2(fetch_from_server=True):
        return False
    status = _status()
    has_types = any(node.ray_node_type_name for node in status.cluster_resource_state.node_states)
    return has_types and status.autoscaling_state.autoscaler_state_version > 0


def can_come(bundle: Mapping[str, float]) -> bool:
    """Whether the autoscaler, where `adds_nodes`, can add a node with these resources; it begins to, where it can.

    `ray.autoscaler.v2.sdk` drops what a cluster's status says of infeasible requests (Ray 2.60), so it is read here;
    `get_max_resources_from_cluster_config` always returns None (ray#63012).

    Raises:
        TryAgain: the autoscaler does not answer.
    """
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    asked_version: int | None = None
    try:
        while time.monotonic() < deadline:
            status = _status()
            if not _has(status.cluster_resource_state.cluster_resource_constraints, bundle):
                # The first time; or Ray Data or Ray Train have put a request of theirs in its place.
                request_resources(bundles=[dict(bundle)])
                asked_version = None
            elif asked_version is None:
                asked_version = status.cluster_resource_state.cluster_resource_state_version
            elif status.autoscaling_state.last_seen_cluster_resource_state_version >= asked_version:
                return not _has(status.autoscaling_state.infeasible_cluster_resource_constraints, bundle)
            time.sleep(0.2)
    finally:
        request_resources(num_cpus=0)  # the request would stand for ever
    raise TryAgain(
        f"--device is auto, and the cluster's autoscaler has not said for {ANSWER_TIMEOUT_S:.0f} s whether a node with "
        f"{', '.join(bundle)} can come; give --device gpu or cpu, or try again"
    )


def _status() -> Any:
    """Returns the requests and nodes that the cluster has now, and what its autoscaler made of those it saw last."""
    reply = GetClusterStatusReply()
    try:
        reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=30))
    except ray.exceptions.RpcError as error:
        cause = " ".join(str(error).split())
        raise TryAgain(f"the cluster's head does not say which nodes can come: {cause}; try again") from error
    return reply


def _has(constraints: Iterable[Any], bundle: Mapping[str, float]) -> bool:
    """Whether the bundle is among the requests."""
    requests = (one.request for constraint in constraints for one in constraint.resource_requests)
    return any(dict(request.resources_bundle) == dict(bundle) for request in requests)
