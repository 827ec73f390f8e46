"""Ray's autoscaler 2 with nodes that are local processes: a job on a head alone gets nodes, uses them, lets them go.

Ray has their GPUs, and TensorFlow is said to see them: all computes on CPUs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from gates import STAGES, Gates
from ray_nodes import RayNodes

from unet_ray.chaos import trials
from unet_ray.chaos.trials import wait_until
from unet_ray.demo import synthetic
from unet_ray.output import verify

ROOT = Path(__file__).parents[2]
RAYLET = f"{Path(ray.__file__).parent}/core/src/ray/raylet/raylet"
N_FRAMES, N_DRIVES = 64, 16

MOST_S = {"decode_chunks": 0.5, "label_chunks": 12}
"""Before more nodes have come frames are decoded slowly, which keeps the first node busy, and labelled more slowly,
which makes the work wait for its actor."""


TYPES = {
    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
}
"""As cluster.yaml and jobs/rayjob.yaml have them: from none."""

SEEN = {"unet_ray.model.devices": {"visible_gpus": ["GPU:0"], "has_bfloat16": False}}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    return Gates(tmp_path_factory.mktemp("gates"), {STAGES: MOST_S}, SEEN)


@pytest.fixture(scope="module")
def nodes(gates: Gates) -> Iterator[RayNodes]:
    with RayNodes(autoscaling=TYPES, settings=gates.settings) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("log")
    synthetic.write_log(
        str(log), seed=0, drives=N_DRIVES, frames_per_drive=N_FRAMES // N_DRIVES, height_px=24, width_px=48
    )
    return log


def n_workers(nodes: RayNodes) -> int:
    """How many nodes there are beside the head."""
    return len(nodes.running(RAYLET)) - 1


def report(nodes: RayNodes, log_file: Path) -> str:
    """Returns what a failure is looked into with: the job's words and the autoscaler's."""
    return f"{log_file.read_text()}\n{nodes.autoscaler_output()}"


@contextmanager
def job(nodes: RayNodes, log_file: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**nodes.environment, "RAY_ADDRESS": nodes.address}
    with log_file.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *options],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.wait()


@pytest.mark.weekly
@pytest.mark.timeout(1200)
def test_labelling_told_nothing_but_paths_asks_for_gpus_uses_them_and_lets_them_go(nodes, gates, log, tmp_path):
    model, out, log_file = trials._write_model(tmp_path / "model", 0), tmp_path / "labels", tmp_path / "said"
    paths = ["--model", str(model), "--frames", f"{log}/CameraRGB", "--out", str(out)]
    most_nodes, actors = 0, set[int]()
    # One batch of a GPU's default size would take all of so few frames, and one actor.
    with job(nodes, log_file, "segment", *paths, "--batch-size", "4") as process:
        while process.poll() is None:
            most_nodes = max(most_nodes, n_workers(nodes))
            actors.update(nodes.running("ray::MapWorker"))
            if most_nodes > 1 and len(actors) > 1:
                for function in MOST_S:
                    gates.open(function)
            time.sleep(0.5)
    lines = log_file.read_text().splitlines()
    assert process.returncode == 0, report(nodes, log_file)
    assert "device: gpu (auto, a node with one can come)" in lines, lines
    (plan,) = (line for line in lines if line.startswith(f"{N_FRAMES} frames in {N_DRIVES} chunks"))
    assert "; 1 to 16 model actors x " in plan
    assert most_nodes > 1 and len(actors) > 1, report(nodes, log_file)
    assert verify.verify(str(out)) == []
    assert wait_until(lambda: n_workers(nodes) == 0, timeout_s=600), report(nodes, log_file)


ASK = """
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from unet_ray.cluster import autoscaler, connection, resources

connection.connect()
print(autoscaler.adds_nodes(), resources.resolve_device("auto"))
asked = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.cluster_constraint_demand
print([bundle for demand in asked for bundle in demand.bundles_by_count])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_auto_is_the_cpu_where_no_gpu_can_ever_come_and_the_request_is_withdrawn():
    with RayNodes(autoscaling={"cpu": TYPES["cpu"]}) as nodes:
        environment = {**nodes.environment, "RAY_ADDRESS": nodes.address}
        done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
        assert done.stdout.splitlines()[2:] == ["device: cpu (auto)", "True cpu", "[]"], done.stdout + done.stderr
        assert n_workers(nodes) == 0


@pytest.mark.weekly
@pytest.mark.timeout(1200)
def test_training_waits_for_its_nodes_and_lets_them_go(nodes, log, tmp_path):
    log_file = tmp_path / "said"
    pairs = ["--images", f"{log}/CameraRGB", "--masks", f"{log}/CameraMask", "--classes", "carla23"]
    small = ["--epochs", "2", "--image-size", "16", "32", "--n-filters", "4", "--depth", "2"]
    three = ["--workers", "3", "--device", "cpu"]
    with job(nodes, log_file, "train", *pairs, *small, "--out", str(tmp_path / "run"), *three) as process:
        pass
    lines = log_file.read_text().splitlines()
    assert process.returncode == 0, report(nodes, log_file)
    lack = "3 training workers want 3 CPUs (1 CPU each); the cluster has 2 CPUs; waiting"
    assert any(line.startswith(lack) for line in lines), report(nodes, log_file)
    assert any(line.startswith("epoch 2/2") for line in lines)
    assert wait_until(lambda: n_workers(nodes) == 0, timeout_s=600), report(nodes, log_file)
