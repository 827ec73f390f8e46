"""The doctor: every node of the cluster looked at from within, or this machine where Ray does not start."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.cluster import probes
from unet_ray.cluster.connection import connect, is_local
from unet_ray.cluster.findings import Finding, NodeReport, Verdict
from unet_ray.cluster.tasks import TASK_RETRIES
from unet_ray.config import DoctorConfig
from unet_ray.errors import TryAgain
from unet_ray.model.device_trial import try_devices
from unet_ray.storage.access import try_access, without_credentials

NODE_TIMEOUT_S = 600.0
"""For a node whose process does not start, or whose GPUs do not answer."""

_SEES_ALL_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Environment of a task that reserves no GPU, since other jobs may have them all, and yet looks at them."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What a node is asked."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    driver_versions: Mapping[str, str]
    reserved: Mapping[str, float] | None = None
    """The node's resources as Ray names them; None where Ray does not run."""
    gcs_address: str | None = None


def examine(config: DoctorConfig) -> list[NodeReport]:
    """Returns a report of each node, in the order of their names; of this machine alone where Ray does not run."""
    question = _Question(inputs=config.inputs, outputs=config.outputs, driver_versions=probes.installed_versions())
    try:
        connect()
    except (TryAgain, ValueError) as error:
        no_ray = Finding(
            topic="Ray",
            text=without_credentials(str(error)),
            verdict=Verdict.FAILS,
            remedy="start it with `ray start --head`, or unset RAY_ADDRESS to use this machine alone",
        )
        return [NodeReport(node="this machine, without Ray", findings=(no_ray, *_look(question)))]
    return _examine_nodes(replace(question, gcs_address=ray.get_runtime_context().gcs_address))


def _examine_nodes(question: _Question) -> list[NodeReport]:
    """Asks all nodes at once, each by a task that runs there and nowhere else."""
    look = ray.remote(num_cpus=0, max_retries=TASK_RETRIES)(_look)
    # Processes of a Ray of this machine have all that they need; another environment costs seconds.
    environment = {} if is_local() else {"runtime_env": {"env_vars": _SEES_ALL_GPUS}}
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    answers = []
    for node in nodes:
        only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked = replace(question, reserved=node["Resources"])
        answers.append(look.options(scheduling_strategy=only_there, **environment).remote(asked))
    ray.wait(answers, num_returns=len(answers), timeout=NODE_TIMEOUT_S)
    return [NodeReport(node=_name(node), findings=_answer(answer)) for node, answer in zip(nodes, answers, strict=True)]


def _name(node: Mapping[str, Any]) -> str:
    is_head = "node:__internal_head__" in node["Resources"]
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}{', the head' if is_head else ''})"


def _answer(answer: Any) -> tuple[Finding, ...]:
    """What a node has found out, or that it did not answer."""
    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        cause, remedy = (
            f"no answer within {NODE_TIMEOUT_S:g} s",
            "look at the node's logs, or take it out of the cluster",
        )
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause, remedy = lines[-1] if lines else type(error).__name__, "install this package there, in the same version"
    return (Finding(topic="Ray", text=without_credentials(cause), verdict=Verdict.FAILS, remedy=remedy),)


def _look(question: _Question) -> tuple[Finding, ...]:
    """All that one node says of itself."""
    trial = try_devices()
    reserved = question.reserved
    uris = [(uri, False) for uri in question.inputs] + [(uri, True) for uri in question.outputs]
    return (
        probes.look_at_versions(probes.installed_versions(), probes.declared_ranges(), question.driver_versions),
        probes.look_at_devices(trial, reserved, probes.count_cards()),
        probes.look_at_capability(trial.gpus or (), trial.built_for),
        probes.look_at_bfloat16(trial.gpus or ()),
        probes.look_at_xla(trial),
        probes.look_at_nccl(trial),
        probes.look_at_onnx(probes.onnx_runtimes(), probes.onnx_providers(), len(trial.gpus or ())),
        probes.look_at_memory(None if reserved is None else reserved.get("object_store_memory", 0), _spill_folder()),
        probes.look_at_threads(None if reserved is None else reserved.get("CPU", 0)),
        *([probes.look_at_access(try_access(uri, writing=writing)) for uri, writing in uris] or [probes.NO_URI]),
        probes.look_at_authentication(question.gcs_address),
    )


def _spill_folder() -> str:
    """Returns where Ray's session lies on this node, which is where it spills to."""
    node: Any = ray._private.worker._global_node
    return tempfile.gettempdir() if node is None else node.get_session_dir_path()
