"""The files for KubeRay and the image: what Ray's own autoscaler reads out of them, and that they fit each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from unet_ray import cli

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
JOB = yaml.safe_load((JOBS / "rayjob.yaml").read_text())
NIGHTLY = yaml.safe_load((JOBS / "raycronjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD, WORKERS = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"]
DOCKERFILE = (JOBS / "Dockerfile").read_text()


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def instructions() -> list[tuple[str, str]]:
    """Returns those of the Dockerfile, with their arguments."""
    lines = (line for line in DOCKERFILE.splitlines() if line and not line.startswith("#"))
    return [(name, argument) for name, _, argument in (line.partition(" ") for line in lines)]


def test_the_job_gives_options_that_the_job_takes():
    python, script, *arguments = JOB["spec"]["entrypoint"].split()
    assert python == "python" and (JOBS / Path(script).name).is_file()
    config = cli.parse("segment", arguments)
    assert (config.out, config.device, config.actors) == ("s3://bucket/labels", "auto", "auto")


def test_all_pods_have_the_image_of_the_dockerfile_and_its_ray():
    images = {container["image"] for group in (HEAD, *WORKERS) for container in pod(group)["containers"]}
    assert len(images) == 1 and f"-t {images.pop()} " in DOCKERFILE
    version = CLUSTER["rayVersion"]
    assert version.split(".")[:2] == ray.__version__.split(".")[:2]
    assert f"rayproject/ray:{version}-" in DOCKERFILE


def test_rays_autoscaler_reads_groups_from_none_with_gpus_and_without():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    resource = {"metadata": {"name": "unet-ray", "namespace": "default"}, "spec": CLUSTER}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)
    types = config.get_node_type_configs()
    resources = {name: {kind: type_.resources.get(kind, 0) for kind in ("CPU", "GPU")} for name, type_ in types.items()}
    assert resources == {
        "headgroup": {"CPU": 0, "GPU": 0},
        "gpu": {"CPU": 16, "GPU": 1},
        "cpu": {"CPU": 16, "GPU": 0},
    }
    assert {name: type_.min_worker_nodes for name, type_ in types.items() if name != "headgroup"} == {
        "gpu": 0,
        "cpu": 0,
    }
    assert {name: type_.max_worker_nodes for name, type_ in types.items() if name != "headgroup"} == {
        "gpu": 8,
        "cpu": 16,
    }
    assert config.get_idle_timeout_s() == 300
    # Version 1 does not say what can never come, and version 2 wants no pod to become another node.
    assert CLUSTER["enableInTreeAutoscaling"] and CLUSTER["autoscalerOptions"]["version"] == "v2"
    assert {pod(group)["restartPolicy"] for group in (HEAD, *WORKERS)} == {"Never"}


def test_pods_that_want_a_gpu_and_no_others_come_to_nodes_that_are_tainted_for_them():
    for group in (HEAD, *WORKERS):
        wants = any("nvidia.com/gpu" in container["resources"]["limits"] for container in pod(group)["containers"])
        taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert pod(group).get("tolerations", []) == ([taint] if wants else [])


def test_the_service_accounts_are_there_and_the_workers_have_no_right_in_kubernetes():
    accounts = {
        account["metadata"]["name"]: account
        for account in yaml.safe_load_all((JOBS / "serviceaccounts.yaml").read_text())
        if account["kind"] == "ServiceAccount"
    }
    used = {group.get("groupName", "head"): pod(group)["serviceAccountName"] for group in (HEAD, *WORKERS)}
    assert used == {"head": "unet-ray-head", "gpu": "unet-ray", "cpu": "unet-ray"}
    assert accounts.keys() == set(used.values())
    assert accounts["unet-ray"]["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in accounts["unet-ray-head"], "the autoscaler in the head's pod needs it"


def test_the_nightly_job_is_the_job():
    # All that KubeRay 1.7 knows beside these is `suspend`; it has no policy for runs that overlap.
    assert NIGHTLY["spec"].keys() == {"schedule", "timeZone", "jobTemplate"}
    assert NIGHTLY["spec"]["jobTemplate"] == JOB["spec"]
    assert re.fullmatch(r"(\S+ ){4}\S+", NIGHTLY["spec"]["schedule"])
    assert (NIGHTLY["apiVersion"], NIGHTLY["kind"]) == (JOB["apiVersion"], "RayCronJob")


def test_the_image_has_one_cuda_and_a_folder_that_its_user_owns():
    given = instructions()
    (base,) = (argument for name, argument in given if name == "ARG")
    (install,) = (argument for name, argument in given if name == "RUN" and "pip install" in argument)
    # tensorflow[and-cuda] has CUDA's libraries; Ray's images ending so have others, of another version.
    assert not re.search(r"-(gpu|cu\d+)$", base) and "gpu]" in install
    (variables,) = (dict(part.split("=", 1) for part in argument.split()) for name, argument in given if name == "ENV")
    assert set(variables["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}
    assert "NVIDIA_VISIBLE_DEVICES" not in variables, "a pod without a GPU of its own would see all of its node's"
    (folder,) = (argument for name, argument in given if name == "WORKDIR")
    assert given.index(("RUN", f"mkdir -p {folder}")) < given.index(("WORKDIR", folder))
    assert all("--chown=ray " in argument for name, argument in given if name == "COPY")
    assert not any(name == "USER" for name, _ in given), "the base image's user is ray"
